"""`GpuRunner` on a stand-in for a GPU: memory, streams, capture and kernels on the host, the network in ONNX Runtime.

It shows that the right calls come in the right order; `make gpu-check` shows that a real GPU obeys them.
"""

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from engines import EngineError, EngineFile, Loop, open_engine
from engines import gpu as gpu_module
from engines.cuda_driver import open_cuda
from engines.gpu import GpuRunner
from engines.philox import normals
from engines.runner import OpenEngine

FEEDBACK = {"x_next": "x", "step_next": "step"}
SEEDS = [7, 8, 9]
X = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 1, 4, 4)
FEEDS = {"x": X, "step": np.zeros(1, np.int64)}


class _Device:
    """A GPU and its driver on the host: memory by address, one stream, and its capture."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self._last = 0
        self.capturing: list[Callable[[], None]] | None = None
        self.captures = self.launches = self.current = self.retained = 0
        self.loaded: list[bytes] = []
        self.refitted: list[bytes] = []

    def allocate(self, size: int) -> int:
        assert self.current
        if size > 1 << 30:
            raise OverflowError
        self._last += 256
        self.memory[self._last] = bytearray(size)
        return self._last

    def copy_in(self, to: int, content: bytes) -> None:
        assert self.capturing is None
        self.memory[to][: len(content)] = content

    def copy_out(self, source: int, size: int) -> bytes:
        assert self.capturing is None
        return bytes(self.memory[source][:size])

    def copy(self, to: int, source: int, size: int) -> None:
        def work() -> None:
            self.memory[to][:size] = self.memory[source][:size]

        self.put(work)

    def launch(self, name: str, arguments: list[int], threads: int) -> None:
        self.put({"normals": self._normals, "advance": self._advance}[name](arguments, threads))

    def _refit(self, weights: bytes) -> bool:
        self.refitted.append(weights)
        return weights != b"other"

    def put(self, work: Callable[[], None]) -> None:
        """What is put on the stream runs at once, or, while it is captured, when the graph is launched."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def synchronize(self) -> None:
        assert self.capturing is None

    def _normals(self, arguments: list[int], threads: int) -> Callable[[], None]:
        out, seeds, iteration, rows, count = arguments
        assert threads >= rows * ((count + 1) // 2)

        def work() -> None:
            (i,) = np.frombuffer(self.memory[iteration], np.int64)
            keys = np.frombuffer(self.memory[seeds], np.uint64)[:rows].tolist()
            noise = normals(keys, int(i) + 1, (count,))
            self.memory[out][: noise.nbytes] = noise.tobytes()

        return work

    def _advance(self, arguments: list[int], threads: int) -> Callable[[], None]:
        (iteration,) = arguments

        def work() -> None:
            self.memory[iteration][:] = (np.frombuffer(self.memory[iteration], np.int64) + 1).tobytes()

        return work

    @contextmanager
    def captured(self, stream: int, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        self.capturing, self.captures = [], self.captures + 1
        work()
        recorded, self.capturing = self.capturing, None

        def launch() -> None:
            self.launches += 1
            for step in recorded:
                step()

        yield launch

    def runtime(self, *, capturable: bool, caches: bool) -> Any:
        """A TensorRT module whose engines are ONNX files."""
        return SimpleNamespace(
            ILogger=type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)}),
            Refitter=lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: bool(self.refitted)),
            OnnxParserRefitter=lambda refitter, logger: SimpleNamespace(refit_from_bytes=self._refit),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="mine"),
            Runtime=lambda logger: SimpleNamespace(
                deserialize_cuda_engine=lambda model: _Engine(self, model, capturable, caches)
            ),
        )


class _Engine:
    device_memory_size_v2 = 2000

    def __init__(self, device: _Device, model: bytes, capturable: bool, caches: bool) -> None:
        self._make = lambda: _Context(device, model, capturable)
        if caches:
            self.create_runtime_config = lambda: SimpleNamespace(
                set_execution_context_allocation_strategy=lambda strategy: None,
                create_runtime_cache=lambda: SimpleNamespace(
                    deserialize=device.loaded.append, serialize=lambda: b"compiled"
                ),
                set_runtime_cache=lambda cache: None,
            )

    def create_execution_context(self, how: Any) -> "_Context":
        return self._make()


class _Context:
    def __init__(self, device: _Device, model: bytes, capturable: bool) -> None:
        self._device, self._session = device, onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.is_stream_capturable = lambda stream: capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or self._shapes[FEEDBACK[name]]

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self._device.memory[address]) == size == 2000

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self._shapes)  # those of the moment it is enqueued

        def work() -> None:
            memory = {name: self._device.memory[address] for name, address in self._addresses.items()}
            feeds = {}
            for port in self._session.get_inputs():
                kind, shape = np.int64 if "int64" in port.type else np.float32, shapes[port.name]
                feeds[port.name] = np.frombuffer(memory[port.name], kind, int(np.prod(shape))).reshape(shape)
            names = [port.name for port in self._session.get_outputs()]
            for name, output in zip(names, self._session.run(names, feeds), strict=True):
                memory[name][: output.nbytes] = output.tobytes()

        self._device.put(work)
        return True


def _pycuda(device: _Device) -> Any:
    """PyCUDA's driver module, for this device."""

    class Allocation:
        def __init__(self, size: int) -> None:
            self.address = device.allocate(size)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            del device.memory[self.address]

    def fill(array: npt.NDArray[Any], source: int) -> None:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(device.copy_out(source, array.nbytes), np.uint8)

    def launch(name: str, *words: np.uint64, block: tuple[int, ...], grid: tuple[int, ...], stream: Any) -> None:
        device.launch(name, [int(word) for word in words], grid[0] * block[0])

    def enter(by: int) -> None:
        device.current += by

    return SimpleNamespace(
        MemoryError=OverflowError,
        init=lambda: None,
        Device=lambda index: SimpleNamespace(
            retain_primary_context=lambda: SimpleNamespace(push=lambda: enter(1), number=index)
        ),
        Context=SimpleNamespace(pop=lambda: enter(-1)),
        Stream=lambda: SimpleNamespace(handle=7, synchronize=device.synchronize),
        mem_alloc=Allocation,
        memcpy_htod=lambda to, array: device.copy_in(to, array.tobytes()),
        memcpy_dtoh=fill,
        memcpy_dtod_async=lambda to, source, size, stream: device.copy(to, source, size),
        module_from_file=lambda path: SimpleNamespace(get_function=lambda name: partial(launch, name)),
    )


def _bindings(device: _Device) -> Any:
    """The driver module of cuda-bindings, for this device: statuses, pointers and handles in place of objects."""
    status = IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_INVALID_DEVICE": 101})

    def count(name: str, by: int) -> Any:
        setattr(device, name, getattr(device, name) + by)

    def launch(function: bytes, *shape: int) -> None:
        *blocks_threads_shared, _, pointers, extra = shape
        assert (blocks_threads_shared[1:3], blocks_threads_shared[4:], extra) == ([1, 1], [1, 1, 0], 0)
        words = {b"normals": 5, b"advance": 1}[function]
        at = np.ctypeslib.as_array((ctypes.c_uint64 * words).from_address(pointers))
        arguments = [ctypes.c_uint64.from_address(int(one)).value for one in at]
        device.launch(function.decode(), arguments, blocks_threads_shared[0] * blocks_threads_shared[3])

    def get(gpu: int) -> Any:
        return (status.CUDA_SUCCESS, gpu) if gpu < 2 else (status.CUDA_ERROR_INVALID_DEVICE, 0)

    functions: dict[str, Callable[..., Any]] = {
        "cuInit": lambda flags: None,
        "cuDevicePrimaryCtxRetain": lambda gpu: count("retained", 1) or 9,
        "cuDevicePrimaryCtxRelease": lambda gpu: count("retained", -1),
        "cuCtxPushCurrent": lambda context: count("current", 1),
        "cuCtxPopCurrent": lambda: count("current", -1) or 9,
        "cuMemAlloc": device.allocate,
        "cuMemFree": lambda address: device.memory.pop(address) and None,
        "cuMemcpyHtoD": lambda to, pointer, size: device.copy_in(to, ctypes.string_at(pointer, size)),
        "cuMemcpyDtoH": lambda pointer, source, size: (
            ctypes.memmove(pointer, device.copy_out(source, size), size) and None
        ),
        "cuMemcpyDtoDAsync": lambda to, source, size, stream: device.copy(to, source, size),
        "cuStreamCreate": lambda flags: 7,
        "cuStreamSynchronize": lambda stream: device.synchronize(),
        "cuStreamDestroy": lambda stream: None,
        "cuModuleLoad": lambda path: b"module",
        "cuModuleUnload": lambda module: None,
        "cuModuleGetFunction": lambda module, name: name,
        "cuLaunchKernel": launch,
    }

    def returning(name: str, work: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                result = work(*arguments)
            except OverflowError:
                return status.CUDA_ERROR_OUT_OF_MEMORY, 0
            return (status.CUDA_SUCCESS,) if result is None else (status.CUDA_SUCCESS, result)

        call.__name__ = name
        return call

    get.__name__ = "cuDeviceGet"
    calls = {name: returning(name, work) for name, work in functions.items()}
    return SimpleNamespace(CUresult=status, cuDeviceGet=get, **calls)


@pytest.fixture(params=["pycuda", "cuda-bindings"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Device:
    made = _Device()
    name = {"pycuda": "pycuda", "cuda-bindings": "cuda.bindings"}[request.param]
    driver = _pycuda(made) if request.param == "pycuda" else _bindings(made)
    for module in ("pycuda", "cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None)
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, f"{name}.driver", driver)
    monkeypatch.setattr(gpu_module, "captured", made.captured)
    return made


@pytest.fixture
def file(walker) -> EngineFile:
    made: EngineFile = walker("onnxruntime")
    return made


def _open(device: _Device, file: EngineFile, *, capturable: bool = True, caches: bool = False) -> OpenEngine:
    trt = device.runtime(capturable=capturable, caches=caches)
    return OpenEngine(file, GpuRunner(trt, open_cuda(1), file, file.path.read_bytes()))


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_is_that_of_the_cpu(device: _Device, file: EngineFile, batch: int, capturable: bool) -> None:
    feeds = FEEDS | {"x": X[:batch]}
    with open_engine(file) as cpu, _open(device, file, capturable=capturable) as gpu:
        for count in (4, 2):
            loop = Loop(count=count, feedback=FEEDBACK, noise={"noise": SEEDS[:batch]})
            expected = cpu.loop(feeds, loop)
            outputs = gpu.loop(feeds, loop)
            assert outputs.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(outputs[name], array)
    assert (device.captures, device.launches) == ((2, 6) if capturable else (0, 0))


def test_a_single_call_is_that_of_the_cpu(device: _Device, file: EngineFile) -> None:
    feeds = FEEDS | {"noise": np.ones_like(X)}
    with open_engine(file) as cpu, _open(device, file) as gpu:
        np.testing.assert_array_equal(gpu(feeds)["x_next"], cpu(feeds)["x_next"])


def test_all_memory_is_given_back(device: _Device, file: EngineFile) -> None:
    with _open(device, file) as gpu:
        held = len(device.memory)
        gpu.loop(FEEDS, Loop(count=2, feedback=FEEDBACK, noise={"noise": SEEDS}))
        assert len(device.memory) == held
    assert (device.memory, device.current, device.retained) == ({}, 0, 0)


def test_an_engine_that_does_not_load_holds_nothing(device: _Device, file: EngineFile) -> None:
    trt = device.runtime(capturable=True, caches=False)
    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda model: None)
    with pytest.raises(EngineError, match=r"onnxruntime cannot load .*walker.* on this GPU: no reason given"):
        GpuRunner(trt, open_cuda(0), file, b"")
    assert (device.memory, device.current, device.retained) == ({}, 0, 0)


def test_memory_that_ran_out_and_a_failing_driver_are_errors_of_one_line(device: _Device) -> None:
    cuda = open_cuda(0)
    with cuda.current():
        assert cuda.allocate(8)
        with pytest.raises(EngineError, match=r"^The GPU's memory ran out: free some, .*smaller largest batch\.$"):
            cuda.allocate(1 << 40)
    for _ in range(2):
        cuda.close()
    assert (device.memory, device.current, device.retained) == ({}, 0, 0)


def test_a_stripped_engine_gets_the_weights_beside_it(device: _Device, file: EngineFile) -> None:
    weights = Path(f"{file.path}.onnx")
    for content in (b"weights", b"other"):
        weights.write_bytes(content)
        stripped = replace(file, weights=hashlib.sha256(content).hexdigest())
        if content == b"weights":
            _open(device, stripped).close()
        else:
            with pytest.raises(EngineError, match=r"onnxruntime cannot put the weights into .*: build it again\."):
                _open(device, stripped)
    assert device.refitted == [b"weights", b"other"]
    weights.write_bytes(b"truncated")
    with pytest.raises(EngineError, match=r"The weights .* has SHA-256 .* truncated, edited or half-written"):
        _open(device, stripped)
    weights.unlink()
    with pytest.raises(EngineError, match=r"Cannot read the weights .*: No such file"):
        _open(device, stripped)


def test_kernels_compiled_once_are_kept_for_the_next_time(device: _Device, file: EngineFile) -> None:
    stored = Path(f"{file.path}.kernels")
    stored.unlink(missing_ok=True)
    _open(device, file, caches=True).close()
    assert (stored.read_bytes(), device.loaded) == (b"compiled", [])
    _open(device, file, caches=True).close()
    assert device.loaded == [b"compiled"]
    stored.unlink()


def test_the_kernels_for_the_gpu_are_what_their_source_says() -> None:
    text = Path(__file__).resolve().parents[2].joinpath("engines", "philox.ptx").read_text()
    assert ".visible .entry normals(" in text
    assert ".visible .entry advance(" in text
