"""Several engines as one: the number of the iteration decides which of them runs.

In: open engines with the same inputs and outputs, and the index of the engine for each iteration. Out: an `Engine`.
It serves plans whose activation bits differ from step to step, for which an engine is built for each width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from engines.base import Engine, Loop
from engines.errors import EngineError
from engines.runner import Arrays


class EngineSwitch:
    """An `Engine` that switches between engines with the same inputs and outputs.

    Where it switches, the fed-back tensors pass through the host's memory.

    Args:
        engines: open engines; they are closed together with this one.
        engine_at: index of the engine that runs each iteration, (iterations,).
        counter: name of the input that holds the number of the iteration and is fed back.

    Raises:
        EngineError: the engines differ in their inputs or outputs, or have no input called `counter`.
    """

    def __init__(self, engines: Sequence[Engine], engine_at: Sequence[int], counter: str) -> None:
        self._engines = tuple(engines)
        self._engine_at = tuple(engine_at)
        self._counter = counter
        self.inputs = engines[0].inputs
        self.outputs = engines[0].outputs
        alike = all((engine.inputs, engine.outputs) == (self.inputs, self.outputs) for engine in engines)
        # The counter has to be an input, since a single call must say which iteration it is.
        if not alike or counter not in {spec.name for spec in self.inputs}:
            self.close()
            raise EngineError(f"Engines take turns if their tensors are the same, {counter!r} among them; build again.")

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run the engine of the iteration that the counter in `feeds` names."""
        return self._engine(self._counter_of(feeds))(feeds)

    def loop(self, feeds: Mapping[str, npt.NDArray[Any]], loop: Loop) -> Arrays:
        """Run `loop.count` iterations, each on its engine; the counter in `feeds` says where to begin."""
        start = self._counter_of(feeds)
        for iteration in (start, start + loop.count - 1):  # refuse a loop that leaves the range before it begins
            self._engine(iteration)
        outputs: Arrays = {}
        done = 0
        # Consecutive iterations on the same engine are one loop of it, so that feedback stays inside the runtime.
        for index, iterations in groupby(self._engine_at[start : start + loop.count]):
            count = len(list(iterations))
            fed_back = {name: outputs[output] for output, name in loop.feedback.items()} if outputs else {}
            part = replace(loop, count=count, first=loop.first + done)
            outputs = self._engines[index].loop({**feeds, **fed_back}, part)
            done += count
        return outputs

    def close(self) -> None:
        """Close all of them."""
        with ExitStack() as stack:  # closes all of them even if one fails
            for engine in self._engines:
                stack.callback(engine.close)

    def _counter_of(self, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
        if self._counter not in feeds or feeds[self._counter].size != 1:
            raise EngineError(f"These engines take turns by {self._counter!r}: feed it, one number.")
        return int(np.asarray(feeds[self._counter]).item())

    def _engine(self, iteration: int) -> Engine:
        if not 0 <= iteration < len(self._engine_at):
            raise EngineError(f"Found iteration {iteration}; these engines take turns for {len(self._engine_at)}.")
        return self._engines[self._engine_at[iteration]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
