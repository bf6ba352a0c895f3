"""The NVIDIA driver, called through ctypes: whether there is a GPU, which one, and CUDA graphs.

No package is needed for it, so a machine without one can still say what it lacks; and PyCUDA does not offer graphs.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engines import generations
from engines.errors import EngineError

# Numbers from cuda.h: a capture mode that calls from other threads do not break, and two device attributes.
_THREAD_LOCAL = 1
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU: `capability` is its generation, such as "8.9", `cuda` the newest CUDA that its driver supports."""

    name: str
    capability: str
    memory_bytes: int
    cuda: str

    @property
    def advice(self) -> str | None:
        """What a user should know of it before quantizing for it, None if there is nothing."""
        return generations.advice(self.name, self.capability)


def no_gpu(number: int = 0) -> str | None:
    """Return why the NVIDIA GPU of this number cannot be used here, or None."""
    try:
        driver = _load()
    except OSError:
        return "no NVIDIA driver here (libcuda was not found): run on a machine with an NVIDIA GPU"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"no NVIDIA GPU here (the driver answered {status} and lists {count.value} devices)"
    if not 0 <= number < count.value:
        return f"there is no GPU {number}: this machine has {count.value}, numbered from 0"
    return None


def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs of this machine; none if there is no driver.

    Raises:
        EngineError: The driver failed.
    """
    if no_gpu():
        return ()
    driver = _load()
    count = ctypes.c_int()
    _must(driver.cuDeviceGetCount(ctypes.byref(count)), "count the GPUs")
    return tuple(_gpu(driver, ordinal) for ordinal in range(count.value))


def cannot_run_on(number: int, backend: str) -> str | None:
    """Return why a backend does not run on the GPU of this number, by its generation; None if there is no such GPU."""
    for gpu in gpus()[number : number + 1]:
        return generations.cannot_run(gpu.name, gpu.capability, backend)
    return None


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    cuda = ctypes.c_int()
    _must(driver.cuDriverGetVersion(ctypes.byref(cuda)), "say its version")
    device = ctypes.c_int()
    _must(driver.cuDeviceGet(ctypes.byref(device), ordinal), "open a GPU")
    name = ctypes.create_string_buffer(128)
    _must(driver.cuDeviceGetName(name, len(name), device), "name a GPU")
    memory = ctypes.c_size_t()
    _must(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "measure a GPU's memory")
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        number = ctypes.c_int()
        _must(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "describe a GPU")
        capability.append(str(number.value))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=".".join(capability),
        memory_bytes=memory.value,
        cuda=f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",  # the driver says 12040 for 12.4
    )


@contextmanager
def captured(stream: int, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Record the kernels and copies that `work` puts on a stream, without running them; yield a call that replays them.

    Args:
        stream: Handle of the stream.
        work: Puts kernels and copies on it.

    Raises:
        EngineError: The driver refused.
    """
    driver = _load()
    handle = ctypes.c_void_p(stream)
    graph = ctypes.c_void_p()  # what was recorded
    ready = ctypes.c_void_p()  # what the device can replay
    _must(driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL), "begin a capture")
    try:
        work()
    finally:  # a stream left in capture mode refuses everything else
        status = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
    _must(status, "capture an iteration")
    try:
        _must(driver.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)), "make a graph")
        try:
            yield lambda: _must(driver.cuGraphLaunch(ready, handle), "launch a graph")
        finally:
            driver.cuGraphExecDestroy(ready)
    finally:
        driver.cuGraphDestroy(graph)


def _load() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _must(status: int, what: str) -> None:
    if status:
        raise EngineError(f"The NVIDIA driver could not {what} (CUDA error {status}).")
