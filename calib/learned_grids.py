"""Activation grids that are learned, with a block's rounding (QDrop) or after it (LSQ), and not just observed.

Legend: x an activation, s the scale of its grid, z the code that stands for 0. Layers of a block that read the same
tensor share a grid, since an engine rounds it once.

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
    """The grid of one activation inside a block, while its scale is learned.

    Attributes:
        layers: those that read the activation, by their names inside the block.
        start: the grid to start from; its zero stays.
        scale: () float32, learned in place.
    """

    layers: tuple[str, ...]
    start: Grid
    scale: Tensor

    @property
    def current(self) -> Grid:
        """The grid as learned so far."""
        scale = max(float(self.scale.detach()), 1e-8)
        # A grid with a zero point is exact in float32 only if scale times code is (see `ranges.round_to_16_bits`).
        return replace(self.start, scale=ranges.round_to_16_bits(scale) if any(self.start.zero) else scale)


def initial_grids(
    block: nn.Module, layers: Sequence[str], io: BlockIO, config: ActivationConfig, generator: torch.Generator
) -> list[LearnedGrid]:
    """Return the grids to start from, one for each tensor that quantized layers of the block read.

    Args:
        block: with the weights that it has now.
        layers: names of the quantized layers in it, "" for the block itself.
        io: recording of its inputs.
        config: width, rule and batches.
        generator: draws the batches.
    """
    rule = ranges.RULES[config.rule]
    reaches: dict[tuple[str, ...], Reach] = {}
    batches = torch.split(torch.randperm(len(io), generator=generator), config.batch)[: config.batches]
    with _inputs(block, layers) as seen:
        for index in batches:
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
    learned = []
    for names, reach in reaches.items():
        grid = ranges.make_grid([reach], config.bits, symmetric=config.symmetric)
        scale = torch.tensor(grid.scale).to(io.device).requires_grad_()
        learned.append(LearnedGrid(layers=names, start=grid, scale=scale))
    return learned


@contextmanager
def _inputs(block: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what will hold the input of each layer, by its name inside the block."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.update({name: args[0]})

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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
    """Round what the block's layers read while this is open.

    Args:
        block: its module.
        learned: the grids, with the names of their layers in it.
        drop: probability of an element to be left float (QDrop, arXiv 2203.05740).
        generator: draws those elements.
    """

    def hook(grid: LearnedGrid) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, args: (_dropped(args[0], grid, drop, generator), *args[1:])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(g)) for g in learned for name in g.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dropped(x: Tensor, grid: LearnedGrid, drop: float, generator: torch.Generator | None) -> Tensor:
    rounded = learnable_round(x, grid.scale, grid.start)
    if drop == 0:
        return rounded
    left = torch.rand(x.shape, generator=generator) < drop  # drawn on the host, and so the same on every device
    return torch.where(left.to(x.device), x, rounded)


def learnable_round(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Round `x` to `grid` with another scale, differentiable in both (LSQ, equations 1 to 3).

    Args:
        x: any shape.
        scale: () float32, in place of the grid's.
        grid: its bits and zero point.
    """
    low, high = integer_range(grid.bits)
    codes = round_straight_through(x / scale + grid.zero[0]).clamp(low, high)
    return (codes - grid.zero[0]) * scale
