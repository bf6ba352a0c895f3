"""What a quantized network costs on paper: multiplications, bit operations, bytes of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.config import FLOAT_BITS
from calib.data import NO_CONDITION, example_inputs
from calib.devices import device_of
from calib.plan import QuantPlan


def layer_macs(
    model: nn.Module, shape: tuple[int, ...], timesteps: int, cond: Mapping[str, Tensor] = NO_CONDITION
) -> dict[str, int]:
    """Return the multiplications that each convolution and linear layer does for one image, by layer name.

    Args:
        model: called as (x, t), or (x, t, cond).
        shape: (C, H, W).
        timesteps: number of training timesteps.
        cond: example conditions, at least one row each.
    """
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def count(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            weight = module.weight  # of a fake-quantized network it is no parameter
            assert isinstance(weight, Tensor)
            # Each output is a sum over one row of the weight, C_in / groups * kh * kw numbers of a convolution.
            macs[name] = macs.get(name, 0) + out.numel() * weight[0].numel()

        return count

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model(*example_inputs(1, shape, timesteps // 2, cond, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return macs


def bit_operations(macs: Mapping[str, int], plan: QuantPlan) -> int:
    """Return the sum over layers of multiplications times weight bits times activation bits, 32 each for a float layer.

    Where the steps of a plan differ in activation bits, it is the mean over the steps.

    Args:
        macs: from `layer_macs`.
        plan: the layers that are not in it are float.
    """
    total = 0.0
    step_bits = plan.step_bits
    for name, count in macs.items():
        layer = plan.layers.get(name)
        if layer is None:
            total += count * FLOAT_BITS**2
        else:
            activation = layer.input.bits if step_bits is None else sum(step_bits.bits) / len(step_bits.bits)
            total += count * layer.weight_bits * activation
    return round(total)


def weight_bytes(model: nn.Module, plan: QuantPlan) -> int:
    """Return the bytes of all parameters: codes packed to their width, a float32 scale a channel, the rest float32."""
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    for layer in plan.layers.values():
        total += layer.codes.numel() * layer.weight_bits // 8 + 4 * len(layer.weight_scale) - 4 * layer.codes.numel()
    return total
