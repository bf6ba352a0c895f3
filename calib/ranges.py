"""Activation scales, from what each quantized layer sees once the weights are quantized.

One symmetric scale a layer, shared by all sampling steps: an exponential moving average (momentum 0.95, TFMQ-DM) of
the largest magnitude in batches drawn across all steps in random order, so that no step weighs more than another. The
rule "minmax" takes the largest of all batches instead, as plain round-to-nearest baselines do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import integer_range
from calib.config import ActivationConfig
from calib.data import CalibrationSet


@dataclass(frozen=True, kw_only=True)
class Range:
    """Largest magnitude of a layer's input and output, put together over the batches by a rule of RULES."""

    input: float
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


def scale_of(magnitude: float, bits: int) -> float:
    """Return the scale whose largest code stands for `magnitude`, rounded to float32."""
    return float(torch.tensor(max(magnitude, 1e-8) / integer_range(bits)[1], dtype=torch.float32))


def batch_count(samples: int, config: ActivationConfig) -> int:
    """Return how many batches `observe` will run."""
    whole = -(-samples // config.batch)
    return whole if config.batches is None else min(config.batches, whole)


def observe(
    model: nn.Module,
    layers: Iterable[str],
    data: CalibrationSet,
    config: ActivationConfig,
    generator: torch.Generator,
    on_batch: Callable[[int], None],
) -> dict[str, Range]:
    """Run the weight-quantized `model` and return the range of each layer.

    A layer that is called several times in a forward pass counts with its largest call.
    """
    rule = RULES[config.rule]
    averages: dict[str, tuple[float | None, float | None]] = dict.fromkeys(layers, (None, None))
    seen: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            now = float(args[0].abs().amax()), float(out.abs().amax())
            seen[name] = max(now[0], seen.get(name, now)[0]), max(now[1], seen.get(name, now)[1])

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in averages]
    order = torch.randperm(len(data), generator=generator)
    try:
        for i in range(batch_count(len(data), config)):
            index = order[i * config.batch : (i + 1) * config.batch]
            seen.clear()
            with torch.no_grad():
                model(data.x[index], data.t[index])
            for name, (a, b) in averages.items():
                averages[name] = rule(a, seen[name][0], config.momentum), rule(b, seen[name][1], config.momentum)
            on_batch(i + 1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Range(input=a or 0.0, output=b or 0.0) for name, (a, b) in averages.items()}
