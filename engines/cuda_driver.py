"""The calls of the CUDA driver that an engine needs, by PyCUDA or by cuda-bindings, whichever is installed.

`Cuda` is what `engines.gpu` sees of either: memory, streams and kernels on one GPU. PyCUDA comes first; it has no
wheels and compiles itself with the CUDA toolkit, which not every machine has. cuda-bindings is NVIDIA's wheel. CUDA
graphs are in `engines.driver`, since PyCUDA has none.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError

Address = int  # of memory on the GPU
Stream = int  # a handle: kernels and copies on it run in order
_PACKAGES = {"pycuda": "pycuda.driver", "cuda-bindings": "cuda.bindings.driver"}  # in order of preference


class Cuda(Protocol):
    """One GPU, in its primary context: the one that PyTorch and the CUDA runtime use too.

    All methods but `current` and `close` are for inside `with current()`.
    """

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current for a block of code, so that others may use the GPU outside it."""

    def allocate(self, size: int) -> Address:
        """Allocate `size` bytes; raise EngineError if there are not as many."""

    def free(self, address: Address) -> None:
        """Free what `allocate` returned."""

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the GPU, and wait for it."""

    def download(self, array: npt.NDArray[Any], source: Address) -> None:
        """Fill a contiguous array from the GPU, and wait for it."""

    def copy(self, to: Address, source: Address, size: int, stream: Stream) -> None:
        """Put a copy within the GPU on a stream."""

    def make_stream(self) -> Stream:
        """Make a stream."""

    def synchronize(self, stream: Stream) -> None:
        """Wait for everything on a stream."""

    def kernels(self, path: Path) -> Any:
        """Load a file of kernels: PTX or machine code."""

    def launch(self, kernels: Any, name: str, arguments: Sequence[int], grid: tuple[int, int], stream: Stream) -> None:
        """Put a kernel on a stream.

        Args:
            kernels: What `kernels` returned.
            name: One of them.
            arguments: Its arguments, each of 64 bits: addresses and whole numbers from 0.
            grid: Blocks, and threads in a block.
            stream: Where to put it.
        """

    def close(self) -> None:
        """Free all that is left: memory, streams, kernels, and the hold on the context; twice is harmless."""


def missing() -> str | None:
    """Return what to install so that `open_cuda` works, or None."""
    if any(_installed(module) for module in _PACKAGES.values()):
        return None
    return "neither PyCUDA nor cuda-bindings is installed: pip install cuda-bindings"


def open_cuda(gpu: int, package: str | None = None) -> Cuda:
    """Open a GPU.

    Args:
        gpu: Its number, from 0.
        package: "pycuda" or "cuda-bindings"; None for the first that is installed.

    Raises:
        EngineError: Neither is installed, or the driver failed.
    """
    name = package or next((name for name, module in _PACKAGES.items() if _installed(module)), None)
    if name is None:
        raise EngineError(f"Cannot use the GPU: {missing()}.")
    return ByPyCuda(gpu) if name == "pycuda" else ByCudaBindings(gpu)


def _installed(module: str) -> bool:
    # `cuda` is a package of several wheels, so finding it is not finding its bindings.
    try:
        return importlib.util.find_spec(module.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


class ByPyCuda:
    """A `Cuda` by PyCUDA."""

    def __init__(self, gpu: int) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self._cuda = cuda
        self._context: Any = cuda.Device(gpu).retain_primary_context()  # None once it is closed
        # PyCUDA frees what is no longer referred to.
        self._memory: dict[Address, Any] = {}
        self._streams: dict[Stream, Any] = {}
        self._modules: list[Any] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        """See `Cuda`."""
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def allocate(self, size: int) -> Address:
        """See `Cuda`."""
        try:
            memory = self._cuda.mem_alloc(size)
        except self._cuda.MemoryError:
            raise _out_of_memory() from None
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: Address) -> None:
        """See `Cuda`."""
        self._memory.pop(address).free()

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """See `Cuda`."""
        self._cuda.memcpy_htod(to, array)

    def download(self, array: npt.NDArray[Any], source: Address) -> None:
        """See `Cuda`."""
        self._cuda.memcpy_dtoh(array, source)

    def copy(self, to: Address, source: Address, size: int, stream: Stream) -> None:
        """See `Cuda`."""
        self._cuda.memcpy_dtod_async(to, source, size, self._streams[stream])

    def make_stream(self) -> Stream:
        """See `Cuda`."""
        stream = self._cuda.Stream()
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: Stream) -> None:
        """See `Cuda`."""
        self._streams[stream].synchronize()

    def kernels(self, path: Path) -> Any:
        """See `Cuda`."""
        module = self._cuda.module_from_file(str(path))
        self._modules.append(module)
        return module

    def launch(self, kernels: Any, name: str, arguments: Sequence[int], grid: tuple[int, int], stream: Stream) -> None:
        """See `Cuda`."""
        blocks, threads = grid
        function = kernels.get_function(name)
        words = map(np.uint64, arguments)
        function(*words, block=(threads, 1, 1), grid=(blocks, 1), stream=self._streams[stream])

    def close(self) -> None:
        """See `Cuda`."""
        if self._context is None:
            return
        with self.current():
            for address in tuple(self._memory):
                self.free(address)
            self._streams.clear()
            self._modules.clear()
        self._context = None


class ByCudaBindings:
    """A `Cuda` by cuda-bindings, whose functions return a status and what the driver's functions fill in."""

    def __init__(self, gpu: int) -> None:
        from cuda.bindings import driver

        self._cuda = driver
        self._memory = set[Address]()
        self._streams = set[Stream]()
        self._modules: list[Any] = []
        self._call(driver.cuInit, 0)
        self._device = self._call(driver.cuDeviceGet, gpu)
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, self._device)  # None once it is closed

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Call the driver; return what it gave, None if that is nothing, or raise EngineError."""
        status, *results = function(*arguments)
        if status == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise _out_of_memory()
        if int(status):
            raise EngineError(f"The NVIDIA driver failed in {function.__name__} ({status.name}).")
        return results[0] if results else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """See `Cuda`."""
        self._call(self._cuda.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            self._call(self._cuda.cuCtxPopCurrent)

    def allocate(self, size: int) -> Address:
        """See `Cuda`."""
        address = int(self._call(self._cuda.cuMemAlloc, size))
        self._memory.add(address)
        return address

    def free(self, address: Address) -> None:
        """See `Cuda`."""
        self._memory.remove(address)
        self._call(self._cuda.cuMemFree, address)

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """See `Cuda`."""
        self._call(self._cuda.cuMemcpyHtoD, to, array.ctypes.data, array.nbytes)

    def download(self, array: npt.NDArray[Any], source: Address) -> None:
        """See `Cuda`."""
        self._call(self._cuda.cuMemcpyDtoH, array.ctypes.data, source, array.nbytes)

    def copy(self, to: Address, source: Address, size: int, stream: Stream) -> None:
        """See `Cuda`."""
        self._call(self._cuda.cuMemcpyDtoDAsync, to, source, size, stream)

    def make_stream(self) -> Stream:
        """See `Cuda`."""
        stream = int(self._call(self._cuda.cuStreamCreate, 0))
        self._streams.add(stream)
        return stream

    def synchronize(self, stream: Stream) -> None:
        """See `Cuda`."""
        self._call(self._cuda.cuStreamSynchronize, stream)

    def kernels(self, path: Path) -> Any:
        """See `Cuda`."""
        module = self._call(self._cuda.cuModuleLoad, str(path).encode())
        self._modules.append(module)
        return module

    def launch(self, kernels: Any, name: str, arguments: Sequence[int], grid: tuple[int, int], stream: Stream) -> None:
        """See `Cuda`."""
        blocks, threads = grid
        function = self._call(self._cuda.cuModuleGetFunction, kernels, name.encode())
        words = np.array(arguments, np.uint64)
        # The driver takes an array of pointers to the arguments, which it copies before it returns.
        pointers = words.ctypes.data + words.itemsize * np.arange(len(words), dtype=np.uint64)
        shape = (blocks, 1, 1, threads, 1, 1, 0)
        self._call(self._cuda.cuLaunchKernel, function, *shape, stream, pointers.ctypes.data, 0)

    def close(self) -> None:
        """See `Cuda`."""
        if self._context is None:
            return
        with self.current():
            for address in tuple(self._memory):
                self.free(address)
            for stream in self._streams:
                self._call(self._cuda.cuStreamDestroy, stream)
            for module in self._modules:
                self._call(self._cuda.cuModuleUnload, module)
            self._streams.clear()
            self._modules.clear()
        self._context = None
        self._call(self._cuda.cuDevicePrimaryCtxRelease, self._device)


def _out_of_memory() -> EngineError:
    return EngineError(
        "The GPU's memory ran out: free some, choose another GPU, or build the engine with a smaller largest batch."
    )
