"""A network beside the float one at little more memory: it shares what is float, and holds the rest as integers.

A deep copy of a U-Net of 860 million parameters is 3.4 GB. Its quantized layers need only their codes, a byte for each
weight, and those the plan has anyway; a layer's weight is worked out anew at each call, to the same bits.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import dequantize_weight


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares all tensors with it; to give a layer other weights, replace its tensors.

    Its parameters take no gradients.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    # Beside buffers, modules may hold tensors as plain attributes, which `deepcopy` refuses where they have a gradient.
    loose = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, memo | {id(v): v.detach() for v in (*model.buffers(), *loose)})


def replace_weight_by_codes(layer: nn.Module, codes: Tensor, scale: Tensor) -> None:
    """Replace the weight of `layer`, in place, by `codes` (C, ...) on grids `scale` (C,), and not a copy of them.

    Args:
        layer: its `weight` is a parameter; afterwards it is computed at each access.
        codes: int8, or float8 where those are rounded to be such numbers.
        scale: float32.

    Both are copied only if the layer is on another device.
    """
    device = layer.get_parameter("weight").device
    del layer.weight
    layer.register_buffer("codes", codes.to(device))
    layer.register_buffer("scale", scale.to(device))
    layer.__class__ = _held(type(layer))


def _held(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of layers of a `kind` that hold integers."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Held{kind.__name__}", (kind,), {"weight": property(_weight)})
    return _CLASSES[kind]


def _weight(layer: nn.Module) -> Tensor:
    codes, scale = layer.get_buffer("codes"), layer.get_buffer("scale")
    return dequantize_weight(codes if codes.dtype == torch.int8 else codes.to(scale.dtype), scale)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
