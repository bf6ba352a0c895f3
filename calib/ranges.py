"""Activation scales, from what each quantized layer sees once the weights are quantized.

One symmetric scale a layer, shared by all sampling steps: an exponential moving average (momentum 0.95, TFMQ-DM) of
the largest magnitude in batches drawn across all steps in random order, so that no step weighs more than another. The
rule "minmax" takes the largest of all batches instead, as plain round-to-nearest baselines do.

With `per_step` each sampling step has an average of its own, from batches of that step alone (TFMQ-DM's finite set
calibration). A step is known by its training timestep t, the only thing of it that a network sees.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import integer_range
from calib.config import ActivationConfig
from calib.data import CalibrationSet


@dataclass(frozen=True, kw_only=True)
class Range:
    """Largest magnitude of a layer's input, one for each step or one for all, and of its output over all steps.

    Put together over the batches by a rule of RULES.
    """

    input: tuple[float, ...]
    output: float


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


def scale_of(magnitude: float, bits: int) -> float:
    """Return the scale whose largest code stands for `magnitude`, rounded to float32."""
    return float(torch.tensor(max(magnitude, 1e-8) / integer_range(bits)[1], dtype=torch.float32))


def batch_count(samples: int, config: ActivationConfig) -> int:
    """Return how many batches `observe` will run."""
    whole = -(-samples // config.batch)
    return whole if config.batches is None else min(config.batches, whole)


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
    data: CalibrationSet,
    batches: Sequence[tuple[int, Tensor]],
    config: ActivationConfig,
    on_batch: Callable[[int], None],
) -> dict[str, Range]:
    """Run the weight-quantized `model` on the batches of `draw` and return the range of each layer.

    A layer that is called several times in a forward pass counts with its largest call.
    """
    rule, names = RULES[config.rule], tuple(layers)
    steps = 1 + max(k for k, _ in batches)
    inputs: dict[str, list[float | None]] = {name: [None] * steps for name in names}
    outputs: dict[str, list[float | None]] = {name: [None] * steps for name in names}
    seen: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            now = float(args[0].abs().amax()), float(out.abs().amax())
            seen[name] = max(now[0], seen.get(name, now)[0]), max(now[1], seen.get(name, now)[1])

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        for done, (k, index) in enumerate(batches, 1):
            seen.clear()
            with torch.no_grad():
                model(data.x[index], data.t[index])
            for name in names:
                for so_far, value in zip((inputs[name], outputs[name]), seen[name], strict=True):
                    so_far[k] = rule(so_far[k], value, config.momentum)
            on_batch(done)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Range(input=tuple(a or 0.0 for a in inputs[name]), output=max(b or 0.0 for b in outputs[name]))
        for name in names
    }
