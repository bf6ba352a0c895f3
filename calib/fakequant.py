"""The quantized network in PyTorch: integer weights times scale, and inputs rounded to their grid, in float32.

This is the reference that every exported graph and every engine is compared with.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import fake_quantize, per_channel
from calib.errors import CalibError
from calib.plan import LayerQuant, QuantPlan
from calib.ranges import nearest_step


def dequantized_weight(layer: LayerQuant) -> Tensor:
    """Return the float32 weight that the integer codes stand for."""
    return layer.codes * per_channel(layer.weight_scale, layer.codes.ndim)


def fake_quantized(model: nn.Module, plan: QuantPlan, *, activations: bool = True) -> nn.Module:
    """Return a copy of `model` that computes what the engine will; the float `model` is left as it is.

    Args:
        model: the float network the plan was made from.
        plan: its plan.
        activations: False to quantize the weights only.

    Raises:
        CalibError: a layer of the plan is not in the model, or has another shape there.
    """
    result = copy.deepcopy(model)
    step: list[Tensor] = []  # of the call at hand: (N,), which of the plan's steps each sample takes its ranges from
    if activations and plan.timesteps is not None:
        result.register_forward_pre_hook(_step_finder(plan.timesteps, step))
    modules = dict(result.named_modules())
    for name, layer in plan.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.codes.shape:
            found = tuple(weight.shape) if weight is not None else "no such layer"
            raise CalibError(
                f"The plan's layer {name!r} is {tuple(layer.codes.shape)}, the model has {found}: "
                "this plan belongs to another model."
            )
        with torch.no_grad():
            weight.copy_(dequantized_weight(layer))
        if activations:
            modules[name].register_forward_pre_hook(_input_quantizer(name, layer, step))
    return result


def _step_finder(timesteps: Tensor, step: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        step[:] = [nearest_step(timesteps, args[1])]

    return hook


def _input_quantizer(
    name: str, layer: LayerQuant, step: Sequence[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    scale = torch.tensor(layer.input_scale, dtype=torch.float32)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if layer.input_ratio is None:
            return fake_quantize(x, scale, layer.input_bits), *args[1:]
        if len(x) != len(step[0]):
            raise CalibError(
                f"Layer {name!r} got {len(x)} rows for {len(step[0])} samples: it cannot tell their steps."
            )
        ratio = per_channel(layer.input_ratio[step[0]], x.ndim)  # (N,) -> (N, 1, ...)
        return fake_quantize(x / ratio, scale, layer.input_bits) * ratio, *args[1:]

    return hook
