"""Timing things side by side."""

import time
from collections.abc import Callable, Mapping


def take_turns(loops: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each loop, one value a round; they take turns, so that a slow minute falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()  # warm-up
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - started)
    return seconds
