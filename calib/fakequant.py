"""The quantized network in PyTorch: integer weights times scale, and inputs rounded to their grid, in float32.

This is the reference that every exported graph and every engine is compared with.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import fake_quantize, per_channel
from calib.errors import CalibError
from calib.plan import LayerQuant, QuantPlan


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
            modules[name].register_forward_pre_hook(_input_quantizer(layer))
    return result


def _input_quantizer(layer: LayerQuant) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    scale = torch.tensor(layer.input_scale, dtype=torch.float32)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize(args[0], scale, layer.input_bits), *args[1:]

    return hook
