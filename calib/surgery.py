"""Rewrites of the float network that leave what it computes but give quantizers better work.

A convolution of a concatenation becomes two whose outputs are added, each with separate grids: the parts of a skip
connection have very different ranges (Q-Diffusion, arXiv 2302.04304, section 3.2.2). And a convolution's input channels
are brought to like ranges by factors r that its weights take over (TCAQ-DM, arXiv 2412.16700), one r for all steps:

    r[d] = sum_t r_t[d] m_t[d] / sum_t m_t[d],    r_t[d] = m_t[d] / min_d m_t[d],    m_t[d] = max |X_t[:, d]|

cut off at a largest value, since a channel that hardly ever moves would make all the others' factors huge.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calib.config import SurgeryConfig
from calib.data import CalibrationSet
from calib.shared_copy import copy_sharing_tensors


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """What is rewritten: `splits` gives the channels of a layer's first part, `factors` its r (C_in,)."""

    splits: Mapping[str, int] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)


class SplitConvolution(nn.Module):
    """A convolution as two, of the first input channels and of the others.

    Args:
        whole: the convolution, weight (C_out, C_in, kh, kw).
        channels: input channels of the first part.
    """

    def __init__(self, whole: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.first = _like(whole, whole.weight[:, :channels], whole.bias)
        self.second = _like(whole, whole.weight[:, channels:], None)  # the bias must be added once

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (N, C_in, H, W), each part of its channels by itself, and add both outputs up."""
        out: Tensor = self.first(x[:, : self.channels]) + self.second(x[:, self.channels :])
        return out


class ScaledConvolution(nn.Module):
    """A convolution whose input is divided by r (C_in,) and whose weights are multiplied by it.

    Args:
        whole: the convolution, weight (C_out, C_in, kh, kw).
        factors: r, positive.
    """

    def __init__(self, whole: nn.Conv2d, factors: Tensor) -> None:
        super().__init__()
        factors = factors.to(whole.weight.device)
        self.register_buffer("factors", factors.reshape(-1, 1, 1).clone())  # against (N, C_in, H, W)
        self.layer = _like(whole, whole.weight * factors.reshape(1, -1, 1, 1), whole.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Divide x (N, C_in, H, W) by the factors and convolve it."""
        out: Tensor = self.layer(x / self.get_buffer("factors"))
        return out


def apply_surgery(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Return the rewritten network, which shares the tensors of all other layers with `model`.

    `model` is never changed, and returned itself where no layer is to be rewritten. Layers that are rewritten already
    stay as they are.

    Args:
        model: the float network.
        surgery: from `plan_surgery`, or from a plan.
    """
    if not surgery.splits and not surgery.factors:
        return model
    result = copy_sharing_tensors(model)
    for name, channels in surgery.splits.items():
        _replace(result, name, partial(SplitConvolution, channels=channels))
    # After the splits: a factor may belong to a part of a split layer, whose name exists only now.
    for name, factors in surgery.factors.items():
        _replace(result, name, partial(ScaledConvolution, factors=factors))
    return result


def plan_surgery(model: nn.Module, data: CalibrationSet, config: SurgeryConfig) -> Surgery:
    """Return which convolutions are to be rewritten, and how.

    Args:
        model: the float network.
        data: what it saw at each sampling step.
        config: which rewrites to look for.
    """
    splits = find_concatenations(model, data) if config.split else {}
    factors = (
        channel_factors(apply_surgery(model, Surgery(splits=splits)), data, config) if config.scale_channels else {}
    )
    return Surgery(splits=splits, factors=factors)


def find_concatenations(model: nn.Module, data: CalibrationSet) -> dict[str, int]:
    """Return the convolutions that read a concatenation of two images, and the channels of the first."""
    joined: dict[int, tuple[Tensor, int]] = {}
    first_channels: dict[str, int] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.cat and len(args[0]) == 2 and out.ndim == 4:  # two (N, C, H, W)
                channels = args[0][0].shape[1]
                if channels < out.shape[1]:  # joined along this axis
                    joined[id(out)] = (out, channels)  # held, so that no later tensor gets its id
            return out

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if id(args[0]) in joined:
                first_channels[name] = joined[id(args[0])][1]

        return look

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in _convolutions(model).items()]
    try:
        with torch.no_grad(), Watch():
            model(*data.inputs(slice(2)))
    finally:
        for handle in handles:
            handle.remove()
    return first_channels


def channel_factors(model: nn.Module, data: CalibrationSet, config: SurgeryConfig) -> dict[str, Tensor]:
    """Return r (C_in,) of every convolution but the first and last (TCAQ-DM; the formula above).

    Args:
        model: the float network, already split.
        data: what it saw; up to `config.images` samples of each sampling step are run.
        config: images a step, and the largest factor.
    """
    most: dict[str, Tensor] = {}
    totals: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: most.update({name: args[0].abs().amax((0, 2, 3))})

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in _convolutions(model).items()]
    try:
        for step in torch.unique(data.step):
            index = (data.step == step).nonzero()[: config.images, 0]
            with torch.no_grad():
                model(*data.inputs(index))
            for name, m in most.items():
                # Both sums at once, so that no more than one step's m_t is in memory.
                above, below = totals.get(name, (torch.zeros_like(m), torch.zeros_like(m)))
                totals[name] = above + m / m.min().clamp(min=1e-6) * m, below + m
    finally:
        for handle in handles:
            handle.remove()
    totals = {name: (above.cpu(), below.cpu()) for name, (above, below) in totals.items()}
    inside = list(totals)[1:-1]  # in call order; the first and last layer stay float
    means = {name: totals[name][0] / totals[name][1].clamp(min=1e-6) for name in inside}
    return {name: mean.clamp(1, config.scale_channels) for name, mean in means.items()}


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that can be rewritten, in the order of the network's modules."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}


def _like(whole: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a convolution like `whole` with another weight."""
    result = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        whole.kernel_size,  # type: ignore[arg-type]
        whole.stride,  # type: ignore[arg-type]
        whole.padding,  # type: ignore[arg-type]
        whole.dilation,  # type: ignore[arg-type]
        bias=bias is not None,
        padding_mode=whole.padding_mode,
        device=whole.weight.device,
    )
    with torch.no_grad():
        result.weight.copy_(weight)
        if result.bias is not None and bias is not None:
            result.bias.copy_(bias)
    return result.requires_grad_(whole.weight.requires_grad).train(whole.training)


def _replace(model: nn.Module, name: str, make: Callable[[nn.Conv2d], nn.Module]) -> None:
    parent, _, last = name.rpartition(".")
    owner, whole = model.get_submodule(parent), model.get_submodule(name)
    if isinstance(whole, nn.Conv2d):
        setattr(owner, last, make(whole).train(whole.training))
