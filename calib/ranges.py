"""Activation grids, from what each quantized layer sees once the weights are quantized.

One grid a layer, shared by all sampling steps: exponential moving averages (momentum 0.95, TFMQ-DM) of how far values
reach below and above 0 in batches drawn across all steps in random order, so that no step weighs more than another.
The rule "minmax" takes the farthest of all batches instead, as plain round-to-nearest baselines do.

With `per_step` each sampling step has separate averages, from batches of that step alone (TFMQ-DM's finite set
calibration). A step is known by its training timestep t, the only thing of it that a network sees.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import integer_range
from calib.attention import intercept_attention
from calib.choices import RangeRule
from calib.config import ActivationConfig
from calib.data import CalibrationSet
from calib.plan import Grid

# By how much a grid must become finer before 0 moves from its middle, which costs an engine a little.
WORTHWHILE_GAIN = 0.1

Reach = tuple[float, float]  # how far values lie below and above 0, neither negative


def ema(average: float | None, value: float, momentum: float) -> float:
    """Return the next moving average; the first value starts it.

    >>> ema(ema(None, 2.0, 0.75), 4.0, 0.75)
    2.5
    """
    return value if average is None else momentum * average + (1 - momentum) * value


def running_max(so_far: float | None, value: float, momentum: float) -> float:
    """Return the larger of the two; `momentum` is for `ema` alone."""
    return value if so_far is None else max(so_far, value)


RULES: dict[RangeRule, Callable[[float | None, float, float], float]] = {
    RangeRule.EMA: ema,
    RangeRule.MINMAX: running_max,
}


def nearest_step(timesteps: Tensor, t: Tensor) -> Tensor:
    """Return the index (N,) of the step whose range serves each of `t` (N,): the nearest of `timesteps` (S,).

    >>> nearest_step(torch.tensor([0, 10, 50]), torch.tensor([4, 10, 31, 99])).tolist()
    [0, 1, 2, 2]
    """
    return (t[:, None] - timesteps.to(t.device)).abs().argmin(1)  # (N, S) -> (N,)


def symmetric_scale(magnitude: float, bits: int) -> float:
    """Return the scale whose largest code stands for `magnitude`, rounded to float32, as graphs hold it."""
    return float(torch.tensor(max(magnitude, 1e-8) / integer_range(bits)[1], dtype=torch.float32))


def make_grid(reaches: Sequence[Reach], bits: int, *, symmetric: bool) -> Grid:
    """Return the grid for how far values reach, at each sampling step or (one reach) at all of them.

    Args:
        reaches: from `observe`.
        bits: width.
        symmetric: True if 0 stays in the middle; otherwise it moves where that makes the grid finer by at least
            WORTHWHILE_GAIN.
    """
    low, high = integer_range(bits)
    middle = [symmetric_scale(max(reach), bits) for reach in reaches]
    moved = [round_to_16_bits(max(sum(reach), 1e-8) / (high - low)) for reach in reaches]
    if symmetric or sum(moved) > (1 - WORTHWHILE_GAIN) * sum(middle):
        scales, zero = middle, tuple(0 for _ in reaches)
    else:
        scales = moved
        # The code of 0, such that `low` stands for the smallest value.
        zero = tuple(round(low + below / scale) for (below, _), scale in zip(reaches, scales, strict=True))
    widest_scale = max(scales)
    if len(reaches) == 1:
        return Grid(scale=widest_scale, bits=bits, zero=zero)
    # Each step's scale as a share of the widest, in float32 as graphs divide by it.
    ratio = tuple((torch.tensor(scales) / widest_scale).tolist())
    return Grid(scale=widest_scale, bits=bits, zero=zero, ratio=ratio)


def make_grids(reaches: Sequence[Reach], config: ActivationConfig) -> tuple[Grid, ...]:
    """Return the grids over `reaches` of all widths that the config has, the widest first."""
    return tuple(make_grid(reaches, bits, symmetric=config.symmetric) for bits in (config.bits, *config.narrower))


def make_operand_grid(reaches: Sequence[Reach], operand: str, bits: int, *, log2: bool = False) -> Grid:
    """Return the grid of an operand inside attention; probabilities have 8 bits, from 0 up, or are powers of two.

    Args:
        reaches: from `observe`.
        operand: one of `calib.attention.OPERANDS`.
        bits: width of the others.
        log2: powers of two for probabilities, in `bits` bits.
    """
    if operand == "probability" and log2:
        return Grid(scale=1.0, bits=bits, log2=True)
    if operand == "probability":  # never negative, so a symmetric grid would waste half of its codes
        return make_grid([(0.0, above) for _, above in reaches], 8, symmetric=False)
    return make_grid(reaches, bits, symmetric=True)


def round_to_16_bits(scale: float) -> float:
    """Round to 16 bits, so that its product with any code is exact in float32."""
    # float32 has 24 bits, and a code at most 8.
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(math.ldexp(mantissa, 16)), exponent - 16)


def draw_batches(
    data: CalibrationSet, config: ActivationConfig, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Return the batches to observe: the number of the step that each counts for, and its samples' indices.

    Without `per_step` all of them count for number 0; with it number k is the k-th smallest timestep in `data`.

    Args:
        data: what the float network saw.
        config: samples a batch, most batches, and `per_step`.
        generator: draws the order of the samples.
    """
    groups = [torch.arange(len(data))]  # all steps mixed, so that no step weighs more than another
    if config.per_step:
        groups = [(data.t == t).nonzero()[:, 0] for t in torch.unique(data.t)]
    most = None if config.batches is None else max(1, config.batches // len(groups))
    drawn: list[tuple[int, Tensor]] = []
    for k, group in enumerate(groups):
        order = group[torch.randperm(len(group), generator=generator)]
        drawn += [(k, index) for index in torch.split(order, config.batch)[:most]]
    return drawn


def observe(
    model: nn.Module,
    layers: Iterable[str],
    products: Iterable[str],
    data: CalibrationSet,
    batches: Sequence[tuple[int, Tensor]],
    config: ActivationConfig,
    on_batch: Callable[[int], None],
) -> dict[tuple[str, str], tuple[Reach, ...]]:
    """Run the weight-quantized `model` on batches and return how far values reach in it.

    Args:
        model: its weights quantized.
        layers: names of layers, whose inputs and outputs are observed.
        products: names of modules, the four `calib.attention.OPERANDS` of whose attention are observed.
        data: what the float network saw.
        batches: from `draw_batches`.
        config: rule and momentum.
        on_batch: called with the number of observed batches.

    Returns:
        By (name, "input"), (name, "output") or (name, operand), the reach at each step, or one for all steps.
    """
    rule = RULES[config.rule]
    steps = 1 + max(k for k, _ in batches)
    averages: dict[tuple[str, str], list[Reach | None]] = {}
    with _reaches(model, layers, products) as seen:
        for done, (k, index) in enumerate(batches, 1):
            seen.clear()
            with torch.no_grad():
                model(*data.inputs(index))
            for key, (below, above) in _farthest(seen).items():
                so_far = averages.setdefault(key, [None] * steps)
                old = so_far[k] or (None, None)
                so_far[k] = rule(old[0], below, config.momentum), rule(old[1], above, config.momentum)
            on_batch(done)
    # A step at which a layer was not called has no values to cover.
    return {key: tuple(reach or (0.0, 0.0) for reach in so_far) for key, so_far in averages.items()}


def _farthest(seen: Mapping[tuple[str, str], Sequence[Tensor]]) -> dict[tuple[str, str], Reach]:
    """Return how far the values of one pass reach; what was met several times counts with the farthest."""
    if not seen:
        return {}
    # All of them come to the host at once. 0 always lies inside a range.
    numbers = iter(torch.stack([bound for bounds in seen.values() for bound in bounds]).cpu().tolist())
    reaches = {}
    for key, bounds in seen.items():
        values = [next(numbers) for _ in bounds]
        reaches[key] = max(0.0, *(-v for v in values)), max(0.0, *values)
    return reaches


@contextmanager
def _reaches(
    model: nn.Module, layers: Iterable[str], products: Iterable[str]
) -> Iterator[dict[tuple[str, str], list[Tensor]]]:
    """Yield a dictionary that the least and largest values, () each, of whatever is observed are added to.

    They stay on the device while `model` runs: a number for the host would make it wait.
    """
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def note(name: str, what: str, value: Tensor) -> Tensor:
        seen.setdefault((name, what), []).extend(value.aminmax())
        return value

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def note_both(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            note(name, "input", args[0])
            note(name, "output", out)

        return note_both

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    for name in products:
        handles += intercept_attention(model.get_submodule(name), partial(note, name))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
