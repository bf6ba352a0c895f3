"""`EngineSwitch`: the same loop as on one engine, each iteration on the engine that it names."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engines import EngineError, Loop, open_engine
from engines.engine_switch import EngineSwitch
from engines.philox import normals

FEEDBACK = {"x_next": "x", "step_next": "step"}
X = np.linspace(-1, 1, 2 * 1 * 4 * 4, dtype=np.float32).reshape(2, 1, 4, 4)
FACTORS = np.float32([0.5, 2.0, -1.0, 0.25])  # of the walker
SEEDS = [7, 8]


class Louder:
    """An engine whose x_next is a hundred times that of another, so that the result shows which of them ran."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls: list[tuple[int, int]] = []

    def __call__(self, feeds: Any) -> Any:
        outputs = self._engine(feeds)
        return {**outputs, "x_next": 100 * outputs["x_next"]}

    def loop(self, feeds: Any, loop: Loop) -> Any:
        self.calls.append((loop.first, loop.count))
        for k in range(loop.count):
            outputs = self._engine.loop(feeds, replace(loop, count=1, first=loop.first + k))
            outputs["x_next"] = 100 * outputs["x_next"]
            feeds = {name: outputs[output] for output, name in loop.feedback.items()}
        return outputs

    def close(self) -> None:
        self._engine.close()


def _loop(count: int, **options: Any) -> Loop:
    return Loop(count=count, feedback=FEEDBACK, noise={"noise": SEEDS}, **options)


def _by_hand(loud: list[int]) -> npt.NDArray[np.float32]:
    x = X
    for i, factor in enumerate(FACTORS):
        x = (x * factor + normals(SEEDS, i + 1, (1, 4, 4))) * np.float32(100 if i in loud else 1)
    return x


def _feeds(step: int = 0) -> dict[str, npt.NDArray[Any]]:
    return {"x": X.copy(), "step": np.array([step], np.int64)}


@pytest.mark.parametrize("engine_at", [[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]])
def test_each_iteration_runs_on_the_engine_named_for_it(engine_at: list[int], walker) -> None:
    steps: list[int] = []
    loud = Louder(open_engine(walker("openvino")))
    with EngineSwitch([open_engine(walker("onnxruntime")), loud], engine_at, "step") as switch:
        outputs = switch.loop(_feeds(), _loop(4, on_step=steps.append))
        once = switch({**_feeds(2), "noise": np.zeros_like(X)})["x_next"]
    by_loud = [i for i, index in enumerate(engine_at) if index]
    np.testing.assert_allclose(outputs["x_next"], _by_hand(by_loud), rtol=1e-5)
    np.testing.assert_allclose(once, -X * (100 if 2 in by_loud else 1))
    assert outputs["step_next"].tolist() == [4]
    assert steps == [0, 1, 2, 3]
    assert sum(count for _, count in loud.calls) == len(by_loud)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_loop_continues_where_another_stopped(backend: str, walker) -> None:
    steps: list[int] = []
    with open_engine(walker(backend)) as engine:
        half = engine.loop(_feeds(), _loop(2, on_step=steps.append))
        rest = {name: half[output] for output, name in FEEDBACK.items()}
        outputs = engine.loop(rest, _loop(2, on_step=steps.append, first=2))
    np.testing.assert_allclose(outputs["x_next"], _by_hand([]), atol=1e-6)
    assert steps == [0, 1, 2, 3]


def test_engines_that_cannot_be_switched_are_refused(walker) -> None:
    with pytest.raises(EngineError, match="their tensors are the same, 'turn' among them"):
        EngineSwitch([open_engine(walker("openvino"))], [0, 0], "turn")
    with EngineSwitch([open_engine(walker("openvino"))], [0, 0], "step") as switch:
        with pytest.raises(EngineError, match="Found iteration 3; these engines take turns for 2"):
            switch.loop(_feeds(), _loop(4))
        with pytest.raises(EngineError, match="take turns by 'step': feed it, one number"):
            switch.loop({"x": X}, _loop(1))
    with pytest.raises(EngineError, match="closed"):
        switch.loop(_feeds(), _loop(1))
