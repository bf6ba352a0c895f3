"""The NVIDIA driver itself, by ctypes: is there a GPU, and the CUDA graphs that PyCUDA has no names for."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engines.errors import EngineError

_THREAD_LOCAL = 1  # a capture that other threads' calls do not break
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU: `capability` is its generation, such as "8.9", `cuda` the newest CUDA that its driver knows."""

    name: str
    capability: str
    memory_bytes: int
    cuda: str


def no_gpu() -> str | None:
    """Return why no NVIDIA GPU can be used here, or None."""
    try:
        driver = _load()
    except OSError:
        return "no NVIDIA driver here (libcuda was not found): run on a machine with an NVIDIA GPU"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"no NVIDIA GPU here (the driver answered {status} and lists {count.value} devices)"
    return None


def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs of this machine, none if there is no driver."""
    if no_gpu():
        return ()
    driver, found = _load(), []
    count, cuda = ctypes.c_int(), ctypes.c_int()
    _must(driver.cuDeviceGetCount(ctypes.byref(count)), "count the GPUs")
    _must(driver.cuDriverGetVersion(ctypes.byref(cuda)), "say its version")
    for ordinal in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
        _must(driver.cuDeviceGet(ctypes.byref(device), ordinal), "open a GPU")
        _must(driver.cuDeviceGetName(name, len(name), device), "name a GPU")
        _must(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "measure a GPU's memory")
        numbers = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            number = ctypes.c_int()
            _must(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "describe a GPU")
            numbers.append(str(number.value))
        found.append(
            Gpu(
                name=name.value.decode(errors="replace"),
                capability=".".join(numbers),
                memory_bytes=memory.value,
                cuda=f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            )
        )
    return tuple(found)


@contextmanager
def captured(stream: int, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Record what `work` puts on the stream with this handle, without running it, and yield a call that replays it.

    Raises:
        EngineError: the driver refused.
    """
    driver, handle = _load(), ctypes.c_void_p(stream)
    graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
    _must(driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL), "begin a capture")
    try:
        work()
    finally:
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
