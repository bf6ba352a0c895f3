"""Calls and loops on an open engine, alike for all backends."""

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto

from engines import EngineError, Loop, open_engine
from engines.philox import normals

CPU_BACKENDS = ["openvino", "onnxruntime"]
FEEDBACK = {"x_next": "x", "step_next": "step"}
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
X = np.linspace(-1, 1, 3 * 1 * 4 * 4, dtype=np.float32).reshape(3, 1, 4, 4)


def _by_hand(seeds: list[int], count: int) -> npt.NDArray[np.float32]:
    x = X
    for i in range(count):
        x = x * np.float32([0.5, 2.0, -1.0, 0.25][i]) + normals(seeds, i + 1, (1, 4, 4))
    return x


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_iteration_reads_what_the_last_one_wrote_and_fresh_noise(backend: str, walker) -> None:
    steps: list[int] = []
    feeds = {"x": X.copy(), "step": np.zeros(1, np.int64)}
    with open_engine(walker(backend)) as engine:
        for count in (1, 2, 4):
            loop = Loop(count=count, feedback=FEEDBACK, noise={"noise": [7, 8, 9]}, on_step=steps.append)
            outputs = engine.loop(feeds, loop)
            np.testing.assert_allclose(outputs["x_next"], _by_hand([7, 8, 9], count), atol=1e-6)
            assert outputs["step_next"].tolist() == [count]
    assert steps == [0, 0, 1, 0, 1, 2, 3]
    assert np.array_equal(feeds["x"], X)  # the caller's arrays are left alone


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_loop_does_not_disturb_single_calls_nor_another_batch(backend: str, walker) -> None:
    feeds = {"x": X, "step": np.array([3]), "noise": np.zeros_like(X)}
    with open_engine(walker(backend)) as engine:
        before = engine(feeds)["x_next"]
        loop = Loop(count=3, feedback=FEEDBACK, noise={"noise": [1]})
        engine.loop({"x": X[:1], "step": np.zeros(1, np.int64)}, loop)
        after = engine(feeds)["x_next"]
    np.testing.assert_allclose(before, 0.25 * X)
    assert np.array_equal(before, after)
    assert not np.shares_memory(before, after)


@pytest.mark.parametrize(
    ("count", "feedback", "noise", "words"),
    [
        (0, FEEDBACK, {"noise": [1, 2, 3]}, r"loop of 0 iterations; ask for 1 or more"),
        (1, {"x_next": "step"}, {"noise": [1, 2, 3]}, r"Output 'x_next' .* cannot be fed back to input 'step'"),
        (1, {"y": "x"}, {"noise": [1, 2, 3]}, r"Output 'y' None cannot be fed back"),
        (1, FEEDBACK, {"noise": [1, 2]}, r"Input 'noise' has shape \(2, 1, 4, 4\), expected .* with batch 3"),
        (1, FEEDBACK, {}, r"Found inputs \['step', 'x'\], this engine takes \['x', 'step', 'noise'\]"),
    ],
)
def test_a_loop_that_makes_no_sense_is_refused(
    count: int, feedback: dict[str, str], noise: dict[str, list[int]], words: str, walker
) -> None:
    with (
        open_engine(walker("onnxruntime")) as engine,
        pytest.raises(EngineError, match=words),
    ):
        engine.loop({"x": X, "step": np.zeros(1, np.int64)}, Loop(count=count, feedback=feedback, noise=noise))
