"""Activation bits chosen step by step: few where the noise that they bring does not show, many where it does.

ratio     the fewest bits with SNR^Q_b(t) > SNR^F(t), or the most if none suffice (PTQD, arXiv 2305.10657, equations
          13 to 15), where SNR^Q_b(t) = |epsilon|^2 / |epsilon_hat - epsilon|^2 with b-bit activations, and SNR^F(t)
          = alpha_bar / (1 - alpha_bar), how much of the image there is in x_t
window    the most in a window of the sampling steps, the fewest outside it (PCR's relaxing, arXiv 2311.06322)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, StepBits
from calib.sqnr import ratio_db

IMAGES = 8  # whose predicted noise is compared at each step


def by_ratio(
    model: nn.Module,
    plan: QuantPlan,
    data: CalibrationSet,
    required_db: Sequence[float],
    around: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> StepBits:
    """Return the fewest bits at each step whose signal over noise exceeds `required_db`.

    Args:
        model: the float network.
        plan: its plan, with grids of several widths.
        data: what the network saw at each of the plan's steps.
        required_db: SNR^F at the plan's timesteps.
        around: makes of a network, float or quantized, what predicts the sampler's noise for `data`.
    """
    assert plan.timesteps is not None
    samples = [data.take((data.t == t).nonzero()[:IMAGES, 0]) for t in plan.timesteps]
    with torch.no_grad():
        whole = around(model)
        exact = [whole(*sample.inputs()).double() for sample in samples]
        measured = {}
        for bits in widths(plan):
            network, row = around(fake_quantized(model, at_bits(plan, bits))), []
            for sample, epsilon in zip(samples, exact, strict=True):
                error = (network(*sample.inputs()).double() - epsilon).square().sum()
                row.append(ratio_db(float(epsilon.square().sum()), float(error)))
            measured[bits] = tuple(row)
    return StepBits(
        bits=fewest(required_db, measured),
        required_db=tuple(required_db),
        measured_db=measured,
    )


def fewest(required_db: Sequence[float], measured_db: Mapping[int, Sequence[float]]) -> tuple[int, ...]:
    """Return for each step the fewest bits that have more than is required there, the most if none have.

    >>> fewest([5.0, 15.0, 35.0], {4: [10.0, 10.0, 10.0], 8: [30.0, 30.0, 30.0]})
    (4, 8, 8)
    """
    rising = sorted(measured_db)
    return tuple(
        next((bits for bits in rising if measured_db[bits][step] > least), rising[-1])
        for step, least in enumerate(required_db)
    )


def by_window(plan: QuantPlan, window: tuple[float, float]) -> StepBits:
    """Return bits of each step: the most inside a window of steps, the fewest outside.

    Args:
        plan: its timesteps and widths.
        window: first and last, as shares of the steps counted from the noisiest.
    """
    assert plan.timesteps is not None
    count, most, least = len(plan.timesteps), max(widths(plan)), min(widths(plan))
    first, last = (round(share * count) for share in window)
    noisiest_first = [most if first <= step < last else least for step in range(count)]
    return StepBits(bits=tuple(reversed(noisiest_first)))


def widths(plan: QuantPlan) -> tuple[int, ...]:
    """Return the activation bits that the plan has grids of, the most first."""
    return plan.config.activation.bits, *plan.config.activation.narrower


def at_bits(plan: QuantPlan, bits: int) -> QuantPlan:
    """Return the plan with all steps at one of its widths; what is inside attention keeps the most.

    Raises:
        CalibError: it has no grids of that width.
    """
    if bits not in widths(plan):
        raise CalibError(f"This plan has activation grids of {list(widths(plan))} bits, and none of {bits}.")
    layers = {}
    for name, layer in plan.layers.items():
        grids = {grid.bits: grid for grid in (layer.input, *layer.narrower)}
        layers[name] = replace(layer, input=grids[bits], narrower=())
    return replace(plan, layers=layers, step_bits=None)
