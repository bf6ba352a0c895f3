"""Both packages make the GPU draw and walk as NumPy does; the tests marked `gpu` need one, and skip without.

pytest -m gpu tests/engines
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines import EngineError, EngineFile, Loop, TensorSpec, cuda_driver
from engines.base import Audit
from engines.cuda_driver import Cuda, missing, open_cuda
from engines.driver import captured, no_gpu
from engines.gpu import GpuRunner
from engines.philox import normals
from engines.runner import OpenEngine

KERNELS = Path(cuda_driver.__file__).with_name("philox.ptx")
WALK = Path(__file__).with_name("walk.ptx")
SHAPE = (3, 7, 11)  # an odd number of elements: the last of the generator's pairs is cut in two
# The GPU computes logarithm, sine and cosine in float64 too, by other formulas, and rounds to float32.
CLOSE = 4e-6


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_PACKAGES", {"no-such": "no_such.driver", "deeper": "no_such.deeper.driver"})
    assert missing() == "neither PyCUDA nor cuda-bindings is installed: pip install cuda-bindings"
    with pytest.raises(EngineError, match=r"^Cannot use the GPU: neither PyCUDA nor cuda-bindings is installed"):
        open_cuda(0)


@pytest.fixture(params=["pycuda", "cuda-bindings"])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    if reason := no_gpu():
        pytest.skip(reason)
    pytest.importorskip({"pycuda": "pycuda.driver", "cuda-bindings": "cuda.bindings.driver"}[request.param])
    opened = open_cuda(0, request.param)
    yield opened
    opened.close()


@pytest.mark.gpu
def test_the_gpu_draws_what_numpy_draws_and_a_replayed_graph_goes_on(cuda: Cuda, record_property: Any) -> None:
    seeds = np.array([7, 8, 2**64 - 1], np.uint64)
    count = int(np.prod(SHAPE))
    drawn = np.empty((len(seeds), *SHAPE), np.float32)
    largest = 0.0
    with cuda.current():
        stream, kernels = cuda.make_stream(), cuda.kernels(KERNELS)
        out, copied, rows, iteration = map(cuda.allocate, (drawn.nbytes, drawn.nbytes, seeds.nbytes, 8))
        cuda.upload(rows, seeds)
        cuda.upload(iteration, np.zeros(1, np.int64))

        def draw() -> None:
            cuda.launch(kernels, "normals", (out, rows, iteration, len(seeds), count), (8, 256), stream)
            cuda.copy(copied, out, drawn.nbytes, stream)
            cuda.launch(kernels, "advance", (iteration,), (1, 1), stream)

        draw()
        cuda.synchronize(stream)
        with captured(stream, draw) as replay:
            for stream_number in range(2, 5):
                replay()
                cuda.synchronize(stream)
                cuda.download(drawn, copied)
                expected = normals(seeds.tolist(), stream_number, SHAPE)
                largest = max(largest, float(np.abs(drawn - expected).max()))
                np.testing.assert_allclose(drawn, expected, rtol=0, atol=CLOSE)
        for address in (out, copied, rows, iteration):
            cuda.free(address)
    record_property("largest difference to NumPy", largest)


@pytest.mark.gpu
def test_memory_that_ran_out_is_an_error_of_one_line(cuda: Cuda) -> None:
    with cuda.current(), pytest.raises(EngineError, match=r"^The GPU's memory ran out"):
        cuda.allocate(1 << 50)


@pytest.mark.gpu
def test_the_loop_is_that_of_numpy_and_an_image_does_not_depend_on_its_batch(
    cuda: Cuda, tmp_path: Path, record_property: Any
) -> None:
    file = _walker(tmp_path)
    x = np.linspace(-1, 1, 16 * 64, dtype=np.float32).reshape(16, 1, 8, 8)
    seeds = list(range(16))
    expected = x
    for step in range(50):
        expected = (expected / 2 + normals(seeds, step + 1, x.shape[1:])).astype(np.float32)

    def loop(engine: OpenEngine, rows: int) -> Any:
        feedback = {"x_next": "x", "step_next": "step"}
        return engine.loop(
            {"x": x[:rows], "step": np.zeros(1, np.int64)},
            Loop(count=50, feedback=feedback, noise={"noise": seeds[:rows]}),
        )

    with OpenEngine(file, GpuRunner(_Runtime(cuda), cuda, file, b"")) as engine:
        together = loop(engine, 16)
        started = time.perf_counter()
        loop(engine, 16)
        record_property("microseconds a step", 1e6 * (time.perf_counter() - started) / 50)
        alone = loop(engine, 1)
    record_property("largest difference to NumPy", float(np.abs(together["x_next"] - expected).max()))
    np.testing.assert_allclose(together["x_next"], expected, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(together["step_next"], [50])
    np.testing.assert_array_equal(alone["x_next"], together["x_next"][:1])


def _walker(folder: Path) -> EngineFile:
    image = TensorSpec(name="x", dtype="float32", shape=(None, 1, 8, 8))
    step = TensorSpec(name="step", dtype="int64", shape=(1,))
    return EngineFile(
        path=folder / "walker.plan",
        backend="tensorrt",
        inputs=(image, step, TensorSpec(name="noise", dtype="float32", shape=image.shape)),
        outputs=(
            TensorSpec(name="x_next", dtype="float32", shape=image.shape),
            TensorSpec(name="step_next", dtype="int64", shape=(1,)),
        ),
        batch=(1, 4, 16),
        sha256="",
        audit=Audit(kernels=(), weight_bytes={}),
        build_seconds=0,
    )


class _Runtime:
    """A TensorRT module whose one engine walks on the GPU: everything about it is real but the network."""

    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=0)

    def __init__(self, cuda: Cuda) -> None:
        self.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda content: SimpleNamespace(
                device_memory_size_v2=0, create_execution_context=lambda strategy: _Walk(cuda)
            )
        )


class _Walk:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._kernels = cuda, cuda.kernels(WALK)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name.removesuffix("_next")]

    def update_device_memory_size_for_shapes(self) -> int:
        return 0

    def set_device_memory(self, address: int, size: int) -> None:
        pass

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        size = int(np.prod(self._shapes["x"]))
        at = [self._addresses[name] for name in ("x", "noise", "step", "x_next", "step_next")]
        self._cuda.launch(self._kernels, "walk", (*at, size), (-(-size // 256), 256), stream)
        return True
