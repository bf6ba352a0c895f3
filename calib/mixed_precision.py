"""Weight bits chosen layer by layer: few where they hardly matter, many or none where they do, within a budget.

How much a layer matters is measured: with that layer alone quantized, the error of the predicted noise,
|eps_hat - eps|^2 / |eps|^2, averaged over sampling steps. Errors of single layers are taken to add up, and the best
assignment under the budget is then an integer program, solved exactly (HiGHS, through scipy):

    min sum_l sum_b e_lb z_lb    subject to    sum_b z_lb = 1 for every layer l,    sum_l sum_b c_lb z_lb <= budget

c is what layer l costs at b bits: bytes of its weight, its bit operations, or milliseconds; z_lb is 1 where layer l
gets b bits. Milliseconds are measured of the network with all layers at b bits, and a layer's are its share of that by
its share of the multiplications: right where all layers have the same width, a straight line between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from calib import affine, ranges
from calib.choices import BudgetUnit
from calib.config import FLOAT_BITS, MixedConfig, QuantConfig
from calib.cost import layer_macs
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import round_input

# Of a network, milliseconds with the layers of these names at each of these widths.
Clock = Callable[[nn.Module, Sequence[str], Sequence[int]], Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class BitAssignment:
    """Weight bits by layer name, FLOAT_BITS where it stays float; each layer's error at each width, if measured."""

    bits: Mapping[str, int]
    errors: Mapping[str, Mapping[int, float]] | None


def assign_bits(
    model: nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    config: QuantConfig,
    timesteps: int,
    clock: Clock | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> BitAssignment:
    """Return the best weight bits for `layers` within the config's budget.

    Args:
        model: the float network.
        data: what it saw at each sampling step.
        layers: names of those that could be quantized.
        config: budget, choices of bits, activation bits.
        timesteps: number of training timesteps.
        clock: measures milliseconds, for a budget of those.
        on_layer: called with (done, total) layers measured.

    Raises:
        CalibError: the fewest bits exceed the budget, or milliseconds are the unit and there is no clock.
    """
    macs = layer_macs(model, tuple(data.x.shape[1:]), timesteps, data.cond)
    if config.mixed.unit is BudgetUnit.MILLISECONDS and clock is None:
        raise CalibError("A budget of milliseconds needs a clock that measures them, and there is none: pass `clock`.")
    if config.mixed.unit is BudgetUnit.MILLISECONDS and clock is not None:
        times = clock(model, layers, config.mixed.choices)
        whole = sum(macs[name] for name in layers)
        costs = {n: {bits: ms * macs[n] / whole for bits, ms in times.items()} for n in layers}
        budget = config.mixed.budget
    else:
        costs, budget = _costs(model, layers, macs, config)
    errors = sensitivities(model, _few(data, config.mixed), layers, config, on_layer)
    return BitAssignment(bits=solve(errors, costs, budget, config.mixed.unit), errors=errors)


def sensitivities(
    model: nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    config: QuantConfig,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[int, float]]:
    """Return the error of the predicted noise with one layer alone quantized, by layer and weight bits; 0 where float.

    The layer's input is rounded too, on a grid over the range that it has in the float network.

    Args:
        model: the float network; its weights are replaced one after another, and put back.
        data: what it saw at each sampling step.
        layers: names of those that could be quantized.
        config: choices of bits, activation bits.
        on_layer: called with (done, total) layers measured.
    """
    activation = config.activation
    batches = [(0, index) for index in torch.split(torch.arange(len(data)), activation.batch)]
    seen = ranges.observe(model, layers, (), data, batches, activation, lambda done: None)
    exact = _predict(model, data, config.micro_batch)
    errors: dict[str, dict[int, float]] = {}
    for done, name in enumerate(layers, 1):
        grid = ranges.make_grid(seen[name, "input"], activation.bits, symmetric=activation.symmetric)
        layer = model.get_submodule(name)
        errors[name] = {}
        for bits in config.mixed.choices:
            if bits == FLOAT_BITS:
                errors[name][bits] = 0.0
                continue
            with _quantized(layer, bits, config):
                handle = round_input(layer, name, grid)
                try:
                    errors[name][bits] = _error(_predict(model, data, config.micro_batch), exact, data.step)
                finally:
                    handle.remove()
        on_layer(done, len(layers))
    return errors


def solve(
    errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], budget: float, unit: str = ""
) -> dict[str, int]:
    """Return the bits of each layer that have the least sum of errors and cost at most `budget`.

    >>> errors = {"a": {4: 9.0, 8: 1.0}, "b": {4: 2.0, 8: 1.0}}
    >>> solve(errors, {"a": {4: 4, 8: 8}, "b": {4: 4, 8: 8}}, 12)
    {'a': 8, 'b': 4}

    Args:
        errors: by layer and bits.
        costs: by layer and bits, in the unit of the budget.
        budget: positive.
        unit: of the budget, for messages.

    Raises:
        CalibError: the fewest bits exceed the budget, or the solver fails.
    """
    # Here, since start-up need not wait for scipy.
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(min(cost.values()) for cost in costs.values())
    if least > budget:
        raise CalibError(f"A budget of {budget:g} {unit} cannot be kept: the fewest bits need {least:g}.")
    pairs = [(name, bits) for name in errors for bits in errors[name]]
    # (L, P): which of the P pairs (layer, bits) are of layer l; one of them is chosen.
    one_each = np.array([[float(name == other) for other, _ in pairs] for name in errors])
    price = np.array([[costs[name][bits] for name, bits in pairs]])
    goal = np.array([errors[name][bits] for name, bits in pairs])
    # Errors and prices are brought near 1: the solver's tolerances are absolute.
    result = milp(
        goal / max(goal.max(), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(price / budget, -inf, 1)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        raise CalibError(f"The solver assigned no bits within a budget of {budget:g} {unit}: {result.message}")
    return {name: bits for (name, bits), chosen in zip(pairs, result.x, strict=True) if chosen > 0.5}


def _costs(
    model: nn.Module, layers: Sequence[str], macs: Mapping[str, int], config: QuantConfig
) -> tuple[dict[str, dict[int, float]], float]:
    """Return what each layer costs at each width, and what they may cost together, in the unit of the budget."""
    mixed, activation = config.mixed, config.activation.bits
    sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in layers}
    if mixed.unit is BudgetUnit.GIGA_BIT_OPERATIONS:
        giga_macs = {name: macs.get(name, 0) / 1e9 for name in layers}
        # Where the weight stays float so does the layer's input.
        costs = {
            n: {b: giga_macs[n] * b * (b if b == FLOAT_BITS else activation) for b in mixed.choices} for n in layers
        }
        rest = sum(count for name, count in macs.items() if name not in sizes) * FLOAT_BITS**2 / 1e9
        return costs, mixed.budget - rest
    if mixed.unit is BudgetUnit.MEGABYTES:
        # A float32 scale a channel, the same at any width.
        scales = 4 * sum(len(model.get_parameter(f"{name}.weight")) for name in layers)
        rest = 4 * (sum(p.numel() for p in model.parameters()) - sum(sizes.values())) + scales
        return {n: {b: sizes[n] * b / 8e6 for b in mixed.choices} for n in layers}, mixed.budget - rest / 1e6
    whole = sum(sizes.values())
    return {n: {b: sizes[n] * b / whole for b in mixed.choices} for n in layers}, mixed.budget


def _few(data: CalibrationSet, config: MixedConfig) -> CalibrationSet:
    """Return the first samples of `config.steps` steps, spread evenly over all."""
    steps = torch.unique(data.step)
    chosen = steps[torch.linspace(0, len(steps) - 1, min(config.steps, len(steps))).round().long()]
    return data.take(torch.cat([(data.step == step).nonzero()[: config.images, 0] for step in chosen]))


@contextmanager
def _quantized(layer: nn.Module, bits: int, config: QuantConfig) -> Iterator[None]:
    """Round the layer's weight to nearest while this is open."""
    weight = layer.get_parameter("weight")
    original = weight.detach().clone()
    scale = affine.search_weight_scale(original, bits, config.weight.norm, config.weight.candidates)
    with torch.no_grad():
        weight.copy_(affine.dequantize_weight(affine.quantize_weight(original, scale, bits), scale))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)


def _predict(model: nn.Module, data: CalibrationSet, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(*data.inputs(i)).cpu() for i in torch.split(torch.arange(len(data)), batch)])


def _error(predicted: Tensor, exact: Tensor, step: Tensor) -> float:
    """Return |predicted - exact|^2 / |exact|^2, of each step's samples together, averaged over the steps."""
    signal = exact.double().square().flatten(1).sum(1)  # (N, C, H, W) -> (N,)
    error = (predicted - exact).double().square().flatten(1).sum(1)
    shares = [float(error[step == s].sum() / signal[step == s].sum()) for s in torch.unique(step)]
    return sum(shares) / len(shares)
