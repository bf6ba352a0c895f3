"""How long a call of each of several engines takes: they take turns, and the median counts.

So whatever else the machine does slows all of them alike.
"""

import statistics
import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from engines.base import Engine, Loop
from engines.runner import Arrays

ROUNDS = 5
_LEAST_SECONDS = 0.02  # of a turn: a clock and a launch are short beside it
_MOST_CALLS = 50  # in a turn


def time_calls(engines: Mapping[str, Engine], batch: int, seconds: float = 5.0) -> dict[str, float]:
    """Return the median seconds of a call, by name of the engine.

    On a GPU the calls of a turn are one loop, so that the host's copies do not count.

    Args:
        engines: Open engines.
        batch: Images at a time.
        seconds: About how long the timing may take; there are fewer rounds then, but one at least.
    """
    turns = {name: partial(_turn, engine, inputs_for(engine, batch)) for name, engine in engines.items()}
    for turn in turns.values():
        turn(1)  # kernels are compiled and buffers allocated
    once = {name: turn(1) for name, turn in turns.items()}
    calls = {name: max(1, min(_MOST_CALLS, int(_LEAST_SECONDS / max(took, 1e-6)))) for name, took in once.items()}
    round_seconds = sum(calls[name] * took for name, took in once.items())
    medians: dict[str, list[float]] = {name: [] for name in engines}
    # Rounds outside: a machine that grows hot or busy then slows every engine, not the last one.
    for _ in range(max(1, min(ROUNDS, int(seconds / max(round_seconds, 1e-6))))):
        for name, turn in turns.items():
            medians[name].append(turn(calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in medians.items()}


def inputs_for(engine: Engine, batch: int) -> Arrays:
    """Return inputs that an engine takes: normal noise where it takes floats, zeros where it takes numbers."""
    generator = np.random.default_rng(0)
    return {
        spec.name: (
            generator.standard_normal(spec.at_batch(batch)).astype(spec.dtype)
            if np.dtype(spec.dtype).kind == "f"
            else np.zeros(spec.at_batch(batch), spec.dtype)
        )
        for spec in engine.inputs
    }


def _turn(engine: Engine, feeds: Arrays, calls: int) -> float:
    """Run an engine some times on the same inputs and return the seconds."""
    started = time.perf_counter()
    engine.loop(feeds, Loop(count=calls, feedback={}))
    return time.perf_counter() - started
