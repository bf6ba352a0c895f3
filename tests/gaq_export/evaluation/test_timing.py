"""Loops that take turns: a warm-up each, then one of each in every round."""

import time

from gaq_export.evaluation.timing import take_turns


def test_loops_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in ("a", "b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_the_seconds_are_those_of_each_loop() -> None:
    seconds = take_turns({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, 2)
    assert min(seconds["slow"]) > 0.04
    assert max(seconds["fast"]) < 0.04
