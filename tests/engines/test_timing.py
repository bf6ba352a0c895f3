"""Engines take turns, on inputs of their own kind, for about as long as was asked."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines import Loop, TensorSpec, open_engine
from engines.timing import ROUNDS, inputs_for, time_calls


@dataclass
class _Engine:
    """An engine whose calls take a time; it writes down whose turn it was, and how many calls that were."""

    name: str
    seconds: float
    log: list[tuple[str, int]]
    inputs: tuple[TensorSpec, ...] = field(default=(TensorSpec(name="step", dtype="int64", shape=(1,)),))

    def loop(self, feeds: dict[str, Any], loop: Loop) -> None:
        self.log.append((self.name, loop.count))
        time.sleep(self.seconds * loop.count)


def test_engines_take_turns_and_the_faster_one_is_seen() -> None:
    log: list[tuple[str, int]] = []
    times = time_calls({"slow": _Engine("slow", 0.004, log), "fast": _Engine("fast", 0.001, log)}, 1)  # type: ignore[dict-item]
    assert times["fast"] < times["slow"]
    assert [name for name, _ in log] == ["slow", "fast"] * (2 + ROUNDS)
    assert log[-1][1] > log[-2][1] > 1


def test_what_takes_long_is_timed_once() -> None:
    log: list[tuple[str, int]] = []
    time_calls({"slow": _Engine("slow", 0.01, log)}, 1, seconds=0.001)  # type: ignore[dict-item]
    assert log == [("slow", 1)] * 3


def test_a_real_engine_takes_the_inputs(walker: Any) -> None:
    with open_engine(walker("onnxruntime")) as engine:
        feeds = inputs_for(engine, 3)
        assert {name: (str(value.dtype), value.shape) for name, value in feeds.items()} == {
            "x": ("float32", (3, 1, 4, 4)),
            "step": ("int64", (1,)),
            "noise": ("float32", (3, 1, 4, 4)),
        }
        assert np.any(feeds["x"])
        assert time_calls({"walker": engine}, 3, seconds=0.01)["walker"] > 0
