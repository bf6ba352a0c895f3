"""Activation scales, from what each quantized layer sees once the weights are quantized.

One symmetric scale a layer, shared by all sampling steps: an exponential moving average (momentum 0.95, TFMQ-DM) of
the largest magnitude in batches drawn across all steps in random order, so that no step weighs more than another. The
rule "minmax" takes the largest of all batches instead, as plain round-to-nearest baselines do.

With `per_step` each sampling step has an average of its own, from batches of that step alone (TFMQ-DM's finite set
calibration). A step is known by its training timestep t, the only thing of it that a network sees.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import integer_range
from calib.attention import intercept
from calib.config import ActivationConfig
from calib.data import CalibrationSet


def ema(average: float | None, value: float, momentum: float) -> float:
    """Return the next moving average; the first value starts it.

    >>> ema(ema(None, 2.0, 0.75), 4.0, 0.75)
    2.5
    """
    return value if average is None else momentum * average + (1 - momentum) * value


def widest(so_far: float | None, value: float, momentum: float) -> float:
    """Return the larger of the two."""
    return value if so_far is None else max(so_far, value)


RULES: dict[str, Callable[[float | None, float, float], float]] = {"ema": ema, "minmax": widest}


def nearest_step(timesteps: Tensor, t: Tensor) -> Tensor:
    """Return the index (N,) of the step whose range serves each of `t` (N,): the nearest of `timesteps` (S,).

    >>> nearest_step(torch.tensor([0, 10, 50]), torch.tensor([4, 10, 31, 99])).tolist()
    [0, 1, 2, 2]
    """
    return (t[:, None] - timesteps).abs().argmin(1)  # (N, S) -> (N,)


def scale_of(magnitude: float, bits: int, *, signed: bool = True) -> float:
    """Return the scale whose largest code stands for `magnitude`, rounded to float32."""
    return float(torch.tensor(max(magnitude, 1e-8) / integer_range(bits, signed=signed)[1], dtype=torch.float32))


def draw(data: CalibrationSet, config: ActivationConfig, generator: torch.Generator) -> list[tuple[int, Tensor]]:
    """Return the batches to observe: the number of the step that each counts for, and its samples' indices.

    Without `per_step` all of them count for number 0; with it number k is the k-th smallest timestep in `data`.
    """
    groups = [torch.arange(len(data))]
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
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Run the weight-quantized `model` on the batches of `draw` and return largest magnitudes.

    Those of ("name", "input") and ("name", "output") of each layer, and of the four `calib.attention.OPERANDS` of each
    module in `products`; one for each step, or one for all. What is met several times in a forward pass counts with
    the largest.
    """
    rule, steps = RULES[config.rule], 1 + max(k for k, _ in batches)
    averages: dict[tuple[str, str], list[float | None]] = {}
    seen: dict[tuple[str, str], float] = {}

    def note(name: str, what: str, value: Tensor) -> Tensor:
        seen[name, what] = max(float(value.abs().amax()), seen.get((name, what), 0.0))
        return value

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            note(name, "input", args[0])
            note(name, "output", out)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    for name in products:
        handles += intercept(model.get_submodule(name), partial(note, name))
    try:
        for done, (k, index) in enumerate(batches, 1):
            seen.clear()
            with torch.no_grad():
                model(data.x[index], data.t[index])
            for key, value in seen.items():
                so_far = averages.setdefault(key, [None] * steps)
                so_far[k] = rule(so_far[k], value, config.momentum)
            on_batch(done)
    finally:
        for handle in handles:
            handle.remove()
    return {key: tuple(a or 0.0 for a in so_far) for key, so_far in averages.items()}
