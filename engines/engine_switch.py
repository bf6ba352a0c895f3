"""Several engines as one: they take turns in a loop, by the number of the iteration."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from engines.base import Engine
from engines.errors import EngineError
from engines.open_engine import Arrays, OnStep


class Relay:
    """An `Engine` made of engines with the same inputs and outputs.

    Where one takes over from another, what is fed back passes through the host's memory.

    Args:
        engines: opened; closed with this.
        turns: which of them runs each iteration.
        counter: the input that holds an iteration's number, and is fed back.

    Raises:
        EngineError: the engines do not have the same tensors, or lack the counter.
    """

    def __init__(self, engines: Sequence[Engine], turns: Sequence[int], counter: str) -> None:
        self._engines, self._turns, self._counter = tuple(engines), tuple(turns), counter
        self.inputs, self.outputs = engines[0].inputs, engines[0].outputs
        alike = all((engine.inputs, engine.outputs) == (self.inputs, self.outputs) for engine in engines)
        if not alike or counter not in {spec.name for spec in self.inputs}:
            self.close()
            raise EngineError(f"Engines take turns if their tensors are the same, {counter!r} among them; build again.")

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run the engine whose turn it is."""
        return self._engine(self._first(feeds))(feeds)

    def loop(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        count: int,
        feedback: Mapping[str, str],
        noise: Mapping[str, Sequence[int]] = {},
        on_step: OnStep = lambda step: None,
        first: int = 0,
    ) -> Arrays:
        """Run `count` iterations, each engine as long as its turn lasts; the counter says where to begin."""
        start, outputs = self._first(feeds), Arrays()
        self._engine(start + count - 1)
        done = 0
        for _, turn in groupby(range(start, start + count), key=lambda k: self._turns[k]):
            mine = list(turn)
            kept = {name: outputs[output] for output, name in feedback.items()} if outputs else {}
            outputs = self._engine(mine[0]).loop(
                {**feeds, **kept}, len(mine), feedback, noise, on_step, first=first + done
            )
            done += len(mine)
        return outputs

    def close(self) -> None:
        """Close all of them."""
        with ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)

    def _first(self, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
        if self._counter not in feeds or feeds[self._counter].size != 1:
            raise EngineError(f"These engines take turns by {self._counter!r}: feed it, one number.")
        return int(np.asarray(feeds[self._counter]).item())

    def _engine(self, iteration: int) -> Engine:
        if not 0 <= iteration < len(self._turns):
            raise EngineError(f"Found iteration {iteration}; these engines take turns for {len(self._turns)}.")
        return self._engines[self._turns[iteration]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
