"""The quantized network in PyTorch: integer weights times scale, and inputs rounded to their grid, in float32.

The four operands of the products inside attention are rounded too, where the plan has grids for them.

This is the reference that every exported graph and every engine is compared with.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib.affine import fake_quantize, per_channel, round_float8, round_log2
from calib.attention import OPERANDS, intercept_attention
from calib.devices import HOST, device_of
from calib.errors import CalibError
from calib.plan import Grid, LayerQuant, QuantPlan
from calib.ranges import nearest_step
from calib.shared_copy import copy_sharing_tensors, replace_weight_by_codes
from calib.surgery import apply_surgery


def fake_quantized(model: nn.Module, plan: QuantPlan, *, activations: bool = True, float8: bool = False) -> nn.Module:
    """Return a network that computes what the engine will, of the plan's codes and what stays float in `model`.

    Args:
        model: the float network the plan was made from.
        plan: the plan.
        activations: False to quantize the weights only.
        float8: with E4M3 numbers in place of integers; weight codes of up to 5 bits are such numbers already.

    Raises:
        CalibError: a layer of the plan is not in the model, or has another shape there.
    """
    result = copy_sharing_tensors(apply_surgery(model, plan.surgery))
    step: list[Tensor] = []  # of the call at hand: (N,), which of the plan's steps each sample takes its ranges from
    if activations and plan.timesteps is not None:
        result.register_forward_pre_hook(_step_finder(plan.timesteps.to(device_of(result)), step))
    modules = dict(result.named_modules())
    for name, layer in plan.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.codes.shape:
            shape = tuple(weight.shape) if weight is not None else "no such layer"
            raise CalibError(
                f"The plan's layer {name!r} is {tuple(layer.codes.shape)}, the model has {shape}: "
                "this plan belongs to another model."
            )
        codes = layer.codes.float().to(torch.float8_e4m3fn) if float8 else layer.codes
        replace_weight_by_codes(modules[name], codes, layer.weight_scale)
        if activations:
            rounded = _layer_rounder(name, layer, plan, step, float8=float8, device=weight.device)
            _before(modules[name], rounded)
    if activations:
        for name, product in plan.products.items():
            device = device_of(result)
            operands = {o: rounder(name, getattr(product, o), step, float8=float8, device=device) for o in OPERANDS}
            intercept_attention(modules[name], _on_operands(operands))
    return result


def round_input(
    module: nn.Module, name: str, grid: Grid, step: Sequence[Tensor] = (), *, float8: bool = False
) -> RemovableHandle:
    """Make `module` round its first input to `grid` until the returned handle is removed.

    Args:
        module: a layer.
        name: its name, for errors.
        grid: one for all steps, unless `step` says which step is at hand.
        step: filled, before each call of the network, with (N,), which of the grid's steps each sample belongs to.
        float8: to E4M3 numbers in place of integers.

    Returns:
        The handle of a forward pre-hook.
    """
    return _before(module, rounder(name, grid, step, float8=float8, device=device_of(module)))


def _before(module: nn.Module, rounded: Callable[[Tensor], Tensor]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))


def _layer_rounder(
    name: str, layer: LayerQuant, plan: QuantPlan, step: Sequence[Tensor], *, float8: bool, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what rounds a layer's input, at each step to as many bits as the plan gives it."""
    if plan.step_bits is None:
        return rounder(name, layer.input, step, float8=float8, device=device)
    by_width = {grid.bits: rounder(name, grid, step, device=device) for grid in (layer.input, *layer.narrower)}
    bits = torch.tensor(plan.step_bits.bits).to(device)

    def rounded(x: Tensor) -> Tensor:
        width_here = per_channel(bits[step[0]], x.ndim)  # (N,) -> (N, 1, ...)
        # Every width is computed and one is chosen, since the samples of a batch may differ in theirs.
        return sum(
            (torch.where(width_here == width, rounds(x), 0.0) for width, rounds in by_width.items()), torch.zeros(())
        )

    return rounded


def _step_finder(timesteps: Tensor, step: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        step[:] = [nearest_step(timesteps, args[1])]

    return hook


def rounder(
    name: str, grid: Grid, step: Sequence[Tensor] = (), *, float8: bool = False, device: torch.device = HOST
) -> Callable[[Tensor], Tensor]:
    """Return the function that rounds an activation (N, ...) of module `name` to its grid; arguments as `round_input`.

    The grid's numbers lie on `device`, that of the activations.

    Raises:
        CalibError: when it is called, if the grid differs by step and there are more or fewer rows than samples.
    """
    if grid.log2:
        return partial(round_log2, scale=grid.scale, bits=grid.bits)
    grid = grid.float8() if float8 else grid
    scale = torch.tensor(grid.scale, dtype=torch.float32).to(device)
    shifts = scale * torch.tensor(grid.zero).to(device) if any(grid.zero) else None  # (1,) or (S,)
    ratios = None if grid.ratio is None else torch.tensor(grid.ratio).to(device)  # (S,)

    def on_grid(x: Tensor, shift: Tensor | None) -> Tensor:
        return round_float8(x / scale) * scale if float8 else fake_quantize(x, scale, grid.bits, shift)

    def rounded(x: Tensor) -> Tensor:
        if ratios is None:
            return on_grid(x, shifts)
        rows, samples = x.shape[0], step[0].shape[0]  # not len(), which would fix them in an exported graph
        if rows != samples:
            raise CalibError(f"{name!r} got {rows} rows for {samples} samples: the steps of the rows are unknown.")
        ratio = per_channel(ratios[step[0]], x.ndim)  # (N,) -> (N, 1, ...)
        shift = None if shifts is None else per_channel(shifts[step[0]], x.ndim)
        return on_grid(x / ratio, shift) * ratio

    return rounded


def _on_operands(rounded: Mapping[str, Callable[[Tensor], Tensor]]) -> Callable[[str, Tensor], Tensor]:
    return lambda operand, x: rounded[operand](x)
