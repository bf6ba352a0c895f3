"""`GpuRunner` on a stand-in for a GPU: memory, streams, capture and kernels on the host, the network in ONNX Runtime.

It shows that the right calls come in the right order; `make gpu-check` shows that a real GPU obeys them.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from engines import EngineError, EngineFile, Loop, open_engine
from engines import gpu as gpu_module
from engines.gpu import GpuRunner
from engines.philox import normals
from engines.runner import OpenEngine

FEEDBACK = {"x_next": "x", "step_next": "step"}
SEEDS = [7, 8, 9]
X = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 1, 4, 4)
FEEDS = {"x": X, "step": np.zeros(1, np.int64)}


class _Memory:
    """Device memory: bytes at an address; using it after it was freed is an error."""

    def __init__(self, device: "_Device", size: int) -> None:
        self.bytes, self._device = bytearray(size), device
        device.memory[id(self)] = self

    def __int__(self) -> int:
        return id(self)

    def free(self) -> None:
        del self._device.memory[id(self)]


class _Device:
    """A driver, a runtime and a capture that share one stream."""

    def __init__(self) -> None:
        self.memory: dict[int, _Memory] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.captures = self.launches = 0
        self.loaded: list[bytes] = []
        self.refitted: list[bytes] = []
        self.cuda: Any = SimpleNamespace(
            init=lambda: None,
            Device=lambda index: SimpleNamespace(retain_primary_context=lambda: SimpleNamespace(push=lambda: None)),
            Context=SimpleNamespace(pop=lambda: None),
            Stream=lambda: SimpleNamespace(handle=1, synchronize=self._not_while_capturing),
            mem_alloc=lambda size: _Memory(self, size),
            to_device=self._to_device,
            memcpy_htod=self._copy_in,
            memcpy_dtoh=self._copy_out,
            memcpy_dtod_async=lambda to, source, size, stream: self._put(lambda: self._copy(to, source, size)),
            module_from_file=lambda path: SimpleNamespace(get_function=lambda name: getattr(self, f"_{name}")),
        )

    def _refit(self, weights: bytes) -> bool:
        self.refitted.append(weights)
        return weights != b"other"

    def _put(self, work: Callable[[], None]) -> None:
        """What is put on the stream runs at once, or, while it is captured, when the graph is launched."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _not_while_capturing(self) -> None:
        assert self.capturing is None

    def _to_device(self, array: npt.NDArray[Any]) -> _Memory:
        memory = _Memory(self, array.nbytes)
        self._copy_in(memory, array)
        return memory

    def _copy_in(self, memory: _Memory, array: npt.NDArray[Any]) -> None:
        self._not_while_capturing()
        memory.bytes[: array.nbytes] = array.tobytes()

    def _copy_out(self, array: npt.NDArray[Any], memory: _Memory) -> None:
        self._not_while_capturing()
        array[...] = np.frombuffer(memory.bytes, array.dtype, array.size).reshape(array.shape)

    def _copy(self, to: _Memory, source: _Memory, size: int) -> None:
        assert {int(to), int(source)} <= self.memory.keys()
        to.bytes[:size] = source.bytes[:size]

    def _normals(self, out: _Memory, seeds: _Memory, iteration: _Memory, rows: Any, count: Any, **launch: Any) -> None:
        assert launch["grid"][0] * launch["block"][0] >= int(rows) * (int(count) + 1) // 2

        def work() -> None:
            (i,) = np.frombuffer(iteration.bytes, np.int64)
            keys = np.frombuffer(seeds.bytes, np.uint64)[: int(rows)].tolist()
            noise = normals(keys, int(i) + 1, (int(count),))
            out.bytes[: noise.nbytes] = noise.tobytes()

        self._put(work)

    def _advance(self, iteration: _Memory, **launch: Any) -> None:
        def work() -> None:
            iteration.bytes[:] = (np.frombuffer(iteration.bytes, np.int64) + 1).tobytes()

        self._put(work)

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
        assert len(self._device.memory[address].bytes) == size == 2000

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self._shapes)  # those of the moment it is enqueued

        def work() -> None:
            memory = {name: self._device.memory[address].bytes for name, address in self._addresses.items()}
            feeds = {}
            for port in self._session.get_inputs():
                kind, shape = np.int64 if "int64" in port.type else np.float32, shapes[port.name]
                feeds[port.name] = np.frombuffer(memory[port.name], kind, int(np.prod(shape))).reshape(shape)
            names = [port.name for port in self._session.get_outputs()]
            for name, output in zip(names, self._session.run(names, feeds), strict=True):
                memory[name][: output.nbytes] = output.tobytes()

        self._device._put(work)
        return True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    made = _Device()
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=made.cuda))
    monkeypatch.setitem(sys.modules, "pycuda.driver", made.cuda)
    monkeypatch.setattr(gpu_module, "captured", made.captured)
    return made


@pytest.fixture
def file(walker) -> EngineFile:
    made: EngineFile = walker("onnxruntime")
    return made


def _open(device: _Device, file: EngineFile, *, capturable: bool = True, caches: bool = False) -> OpenEngine:
    trt = device.runtime(capturable=capturable, caches=caches)
    return OpenEngine(file, GpuRunner(trt, file, file.path.read_bytes()))


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
    assert device.memory == {}


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
