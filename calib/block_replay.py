"""Run a network up to one block after another, and each block only once.

Calibration needs the inputs of every block in turn, for the same samples. Running the network from its start each
time costs as many block passes as there are pairs of blocks. A replay stores what the finished blocks returned the
first time and returns it in place of their computation, so that the way to the next block costs very little. Outputs
that only lead to other replayed blocks are not even read. Outputs beyond `budget` bytes are not stored; those blocks
are computed again.

Samples always run in the same micro-batches, the last one filled up, so that what is recorded does not depend on
whether a block was computed or replayed: a killed calibration that continues gets the same bits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from calib.data import CalibrationSet
from calib.sample_store import IN_MEMORY, Samples, SampleStore, rows_at


class _Reached(Exception):
    """Raised by a hook to end a forward pass at the block whose values it is run for."""


class _Uses(TorchFunctionMode):
    """Sees which replayed outputs are computed with; the others only pass from one replayed block to the next."""

    def __init__(self) -> None:
        super().__init__()
        self._replayed: dict[int, tuple[str, Tensor]] = {}  # tensors are held, so that no later one gets their id
        self.names: set[str] = set()

    def watch(self, name: str, out: Tensor) -> None:
        """Wait for a use of block `name`'s output."""
        self._replayed[id(out)] = name, out

    def note(self, values: Any) -> None:
        """Count whatever outputs are among `values` as used."""
        self.names |= {self._replayed[id(v)][0] for v in pytree.tree_leaves(values) if id(v) in self._replayed}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and note what it was called with."""
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A micro-batch: indices (n,) of its samples, where it starts, and how many of its rows count."""

    index: Tensor
    start: int
    rows: int


class Replay:
    """A network on `data`, block by block.

    Args:
        network: called as (x, t); a block's weights must stay as they are once it is finished.
        data: the samples.
        micro_batch: samples a forward pass.
        store: where recordings go.
        budget: bytes of finished blocks' outputs to store; if None, as many as the store has room for.
    """

    def __init__(
        self,
        network: nn.Module,
        data: CalibrationSet,
        micro_batch: int,
        store: SampleStore = IN_MEMORY,
        budget: float | None = None,
    ) -> None:
        self._network = network
        self._data = data
        self._size = micro_batch
        self._store = store
        self._budget = store.budget if budget is None else budget
        self._finished: dict[str, None] = {}  # names in order; a dictionary, so that each is in it once
        self._stored: dict[str, Samples] = {}  # their outputs (N, ...), as far as the budget goes

    def finish(self, name: str) -> None:
        """Mark block `name` as finished: it will not change any more."""
        self._finished[name] = None

    def inputs(self, name: str) -> tuple[tuple[Any, ...], tuple[bool, ...], pytree.TreeSpec]:
        """Return the leaves of block `name`'s (args, kwargs), which of them are rows, and how they make it up."""
        seen: list[tuple[list[Any], pytree.TreeSpec]] = []
        uses = _Uses()

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            uses.note((args, kwargs))
            seen.append(pytree.tree_flatten((args, kwargs)))
            raise _Reached

        store: list[Any] = []
        batched: tuple[bool, ...] = ()
        with self._network.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True):
            for start, rows in self._run(uses):
                leaves, spec = seen.pop()
                if not store:
                    batched = tuple(isinstance(v, Tensor) and v.ndim > 0 and len(v) == self._size for v in leaves)
                    store = [self._room(v, f"input-{i}") if batched[i] else v for i, v in enumerate(leaves)]
                for i, leaf in enumerate(leaves):
                    if batched[i]:
                        store[i][start : start + rows] = leaf[:rows]
        return tuple(store), batched, spec

    def output(self, name: str) -> Samples:
        """Return what block `name` gives (N, ...); it is finished now."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen.append(out)
            raise _Reached

        store: Samples | None = None
        affordable = False
        with self._network.get_submodule(name).register_forward_hook(hook):
            for start, rows in self._run(_Uses()):
                out = seen.pop()
                if store is None:
                    affordable, store = self._afford(out), self._room(out, f"{name}.output")
                store[start : start + rows] = out[:rows]
        assert store is not None
        self.finish(name)
        if affordable:
            self._stored[name] = store
        return store

    def _run(self, uses: _Uses) -> Iterator[tuple[int, int]]:
        """Run micro-batches until a hook stops each of them, and yield (start, rows that count)."""
        fresh: dict[str, Samples] = {}
        blanks: dict[str, Tensor] = {}
        with torch.no_grad():
            for start in range(0, len(self._data), self._size):
                # The last micro-batch repeats the last sample: other batch sizes give other last bits.
                index = torch.arange(start, start + self._size).clamp(max=len(self._data) - 1)
                batch = _Batch(index=index, start=start, rows=min(self._size, len(self._data) - start))
                # The first one shows whose outputs matter; those of the others need not be read any more.
                watching = nullcontext() if start else uses
                with self._short_cuts(batch, fresh, blanks, uses), suppress(_Reached), watching:
                    self._network(*self._data.inputs(index))
                if start == 0:
                    blanks = {name: blank for name, blank in blanks.items() if name not in uses.names}
                yield start, batch.rows
        self._stored |= fresh  # only now that all N rows of them are there

    @contextmanager
    def _short_cuts(
        self, batch: _Batch, fresh: dict[str, Samples], blanks: dict[str, Tensor], uses: _Uses
    ) -> Iterator[None]:
        """Make finished blocks return what they returned before; what is computed for the first time is stored.

        Args:
            batch: the micro-batch at hand.
            fresh: gets what is computed for the first time, by block.
            blanks: gets, from the first micro-batch, what stands for an output that no one computes with; returned in
                its place in the others.
            uses: watches the outputs of the first micro-batch.
        """

        def replayed(name: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                if name not in self._stored:
                    return self._computed(name, compute(*args, **kwargs), batch, fresh)
                if batch.start and name in blanks:
                    return blanks[name]
                out = rows_at(self._stored[name], batch.index, self._data.device)
                if not batch.start:
                    uses.watch(name, out)
                    blanks[name] = out.new_empty(()).expand(out.shape)  # the memory of one number
                return out

            return forward

        modules = [(name, self._network.get_submodule(name)) for name in self._finished]
        for name, module in modules:
            module.forward = replayed(name, module.forward)
        try:
            yield
        finally:
            for _, module in modules:
                del module.forward

    def _computed(self, name: str, out: Tensor, batch: _Batch, fresh: dict[str, Samples]) -> Tensor:
        """Store what a finished block computes for the first time, as far as the budget goes."""
        out = out.contiguous()  # as it will be replayed: another layout gives other last bits
        if batch.start == 0 and self._afford(out):
            fresh[name] = self._room(out, f"{name}.output")
        if name in fresh:
            fresh[name][batch.start : batch.start + batch.rows] = out[: batch.rows]
        return out

    def _room(self, value: Tensor, name: str) -> Samples:
        return self._store.allocate(value, len(self._data), name)

    def _afford(self, sample: Tensor) -> bool:
        """Take the bytes for N rows like `sample` (n, ...) from the budget, if it has them."""
        size = len(self._data) * math.prod(sample.shape[1:]) * sample.element_size()
        if size > self._budget:
            return False
        self._budget -= size
        return True
