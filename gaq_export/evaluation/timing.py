"""Fair timing: loops take turns, so that whatever else the machine does slows all of them alike."""

import time
from collections.abc import Callable, Mapping


def take_turns(loops: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run loops in turn, and return the seconds of each, one value a round.

    Args:
        loops: what to time, by name; each runs once before timing starts, to warm up.
        rounds: how often each is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()  # caches fill and buffers are allocated
    # Rounds outside: a machine that grows hot or busy then slows every loop, not the last ones.
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - started)
    return seconds
