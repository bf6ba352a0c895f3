"""Engines that take turns: the same loop as by one, each iteration by the engine whose turn it is."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engines import EngineError, open_engine
from engines.engine_switch import Relay
from engines.philox import normals

FEEDBACK = {"x_next": "x", "step_next": "step"}
X = np.linspace(-1, 1, 2 * 1 * 4 * 4, dtype=np.float32).reshape(2, 1, 4, 4)
FACTORS = np.float32([0.5, 2.0, -1.0, 0.25])  # of the walker
SEEDS = [7, 8]


class Louder:
    """An engine whose x_next is a hundred times that of another, so that one sees who did what."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls: list[tuple[int, int]] = []

    def __call__(self, feeds: Any) -> Any:
        found = self._engine(feeds)
        return {**found, "x_next": 100 * found["x_next"]}

    def loop(self, feeds: Any, count: int, feedback: Any, noise: Any, on_step: Any, first: int) -> Any:
        self.calls.append((first, count))
        for k in range(count):
            found = self._engine.loop(feeds, 1, feedback, noise, on_step, first=first + k)
            found["x_next"] = 100 * found["x_next"]
            feeds = {name: found[output] for output, name in feedback.items()}
        return found

    def close(self) -> None:
        self._engine.close()


def _by_hand(loud: list[int]) -> npt.NDArray[np.float32]:
    x = X
    for i, factor in enumerate(FACTORS):
        x = (x * factor + normals(SEEDS, i + 1, (1, 4, 4))) * np.float32(100 if i in loud else 1)
    return x


def _feeds(step: int = 0) -> dict[str, npt.NDArray[Any]]:
    return {"x": X.copy(), "step": np.array([step], np.int64)}


@pytest.mark.parametrize("turns", [[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]])
def test_each_iteration_is_done_by_the_engine_whose_turn_it_is(turns: list[int], walker) -> None:
    conditioning: list[int] = []
    loud = Louder(open_engine(walker("openvino")))
    with Relay([open_engine(walker("onnxruntime")), loud], turns, "step") as relay:
        found = relay.loop(_feeds(), 4, FEEDBACK, {"noise": SEEDS}, conditioning.append)
        once = relay({**_feeds(2), "noise": np.zeros_like(X)})["x_next"]
    by_loud = [i for i, turn in enumerate(turns) if turn]
    np.testing.assert_allclose(found["x_next"], _by_hand(by_loud), rtol=1e-5)
    np.testing.assert_allclose(once, -X * (100 if 2 in by_loud else 1))
    assert found["step_next"].tolist() == [4]
    assert conditioning == [0, 1, 2, 3]
    assert sum(count for _, count in loud.calls) == len(by_loud)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_loop_goes_on_where_another_stopped(backend: str, walker) -> None:
    conditioning: list[int] = []
    with open_engine(walker(backend)) as engine:
        half = engine.loop(_feeds(), 2, FEEDBACK, {"noise": SEEDS}, conditioning.append)
        kept = {name: half[output] for output, name in FEEDBACK.items()}
        found = engine.loop(kept, 2, FEEDBACK, {"noise": SEEDS}, conditioning.append, first=2)
    np.testing.assert_allclose(found["x_next"], _by_hand([]), atol=1e-6)
    assert conditioning == [0, 1, 2, 3]


def test_what_cannot_be_a_relay_is_refused(walker) -> None:
    with pytest.raises(EngineError, match="their tensors are the same, 'turn' among them"):
        Relay([open_engine(walker("openvino"))], [0, 0], "turn")
    with Relay([open_engine(walker("openvino"))], [0, 0], "step") as relay:
        with pytest.raises(EngineError, match="Found iteration 3; these engines take turns for 2"):
            relay.loop(_feeds(), 4, FEEDBACK, {"noise": SEEDS})
        with pytest.raises(EngineError, match="take turns by 'step': feed it, one number"):
            relay.loop({"x": X}, 1, FEEDBACK, {"noise": SEEDS})
    with pytest.raises(EngineError, match="closed"):
        relay.loop(_feeds(), 1, FEEDBACK, {"noise": SEEDS})
