"""Activation grids learned with a block's rounding (QDrop) or after it (LSQ), where the others are only observed.

Legend: x an activation, s the step of its grid, z the code that stands for 0, both learned for a block's layers
together; layers that read the same tensor share them, as an engine's do.

    x_hat = s (clamp(round(x / s + z), low, high) - z),   d round / dx = 1   (Esser et al., arXiv 1902.08153)

QDrop (Wei et al., arXiv 2203.05740) rounds the activations while the rounding of the weights is learned, each element
only with a certain probability, and feeds the block a mixture of float and quantized inputs. s starts from observed
ranges and is learned; z stays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from calib import ranges
from calib.affine import integer_range, round_straight_through
from calib.blocks import BlockIO
from calib.config import ActivationConfig
from calib.plan import Grid
from calib.ranges import Reach


@dataclass(frozen=True, kw_only=True)
class LearnedGrid:
    """The grid of one activation inside a block: `layers` read it, by their names there; `step` () is learned."""

    layers: tuple[str, ...]
    start: Grid
    step: Tensor

    @property
    def grid(self) -> Grid:
        """The grid as learned so far."""
        step = max(float(self.step.detach()), 1e-8)
        return replace(self.start, scale=ranges.round_to_16_bits(step) if any(self.start.zero) else step)


def initial_grids(
    block: nn.Module, layers: Sequence[str], io: BlockIO, config: ActivationConfig, generator: torch.Generator
) -> list[LearnedGrid]:
    """Return the grids to start from, by the ranges that the block's layers see of its recorded inputs.

    Args:
        block: with its weights as they stand.
        layers: names of the quantized layers in it, "" for the block itself.
        io: recording of its inputs.
        config: width, rule and batches.
        generator: draws the batches.
    """
    rule = ranges.RULES[config.rule]
    seen: dict[str, Tensor] = {}
    reaches: dict[tuple[str, ...], Reach] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.update({name: args[0]})

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        for index in torch.split(torch.randperm(len(io), generator=generator), config.batch)[: config.batches]:
            args, kwargs = io.take(index).call()
            with torch.no_grad():
                block(*args, **kwargs)
            for names in _readers(seen):
                least, most = (float(bound) for bound in seen[names[0]].aminmax())
                below, above = reaches.get(names, (None, None))
                reaches[names] = (
                    rule(below, max(-least, 0.0), config.momentum),
                    rule(above, max(most, 0.0), config.momentum),
                )
    finally:
        for handle in handles:
            handle.remove()
    grids = {
        names: ranges.make_grid([reach], config.bits, symmetric=config.symmetric) for names, reach in reaches.items()
    }
    return [
        LearnedGrid(layers=names, start=grid, step=torch.tensor(grid.scale, requires_grad=True))
        for names, grid in grids.items()
    ]


def _readers(seen: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Group the layers that read the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in seen.items():
        groups.setdefault(id(value), []).append(name)
    return [tuple(names) for names in groups.values()]


@contextmanager
def rounded_inputs(
    block: nn.Module, learned: Sequence[LearnedGrid], drop: float = 0.0, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Round what the block's layers read while this is open, each element left float with probability `drop`."""

    def hook(grid: LearnedGrid) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, args: (_dropped(args[0], grid, drop, generator), *args[1:])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(g)) for g in learned for name in g.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dropped(x: Tensor, grid: LearnedGrid, drop: float, generator: torch.Generator | None) -> Tensor:
    rounded = learnable_round(x, grid.step, grid.start)
    if drop == 0:
        return rounded
    return torch.where(torch.rand(x.shape, generator=generator) < drop, x, rounded)


def learnable_round(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Round `x` to `grid` with another `step` (), differentiable in both."""
    low, high = integer_range(grid.bits)
    codes = round_straight_through(x / step + grid.zero[0]).clamp(low, high)
    return (codes - grid.zero[0]) * step
