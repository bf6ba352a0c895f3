"""Which layers cost the most: the error of the predicted noise with each layer quantized alone."""

from collections.abc import Callable
from dataclasses import replace

import torch

from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from gaq_export.models.loader import LoadedModel

FEW = 4  # samples of each step
STEPS = 5  # steps at which every layer is quantized alone
PRODUCTS = "attention products"


def sensitivity(
    model: LoadedModel, plan: QuantPlan, data: CalibrationSet, on_step: Callable[[str, int, int], None]
) -> dict[str, float]:
    """Return the error of the predicted noise with each layer quantized alone, in network order.

    It is |eps_hat - eps|^2 / |eps|^2 over FEW samples of each of STEPS steps, evenly spread. All products inside
    attention that the plan rounds are one more entry, PRODUCTS.

    Args:
        model: the float model.
        plan: made from it.
        data: calibration samples to take the inputs from.
        on_step: called with (what is being done, layers done, layers in all).
    """
    steps = torch.unique(data.step)
    chosen = steps[torch.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().long()]
    few = some_of_each_step(data.take(torch.isin(data.step, chosen).nonzero()[:, 0]), FEW)
    alone = {name: replace(plan, layers={name: layer}, products={}) for name, layer in plan.layers.items()}
    if plan.products:
        alone[PRODUCTS] = replace(plan, layers={})
    errors: dict[str, float] = {}
    with torch.no_grad():
        exact = model.network(*few.inputs()).double()
        for name, part in alone.items():
            # In float64: the error of one layer is a small difference of large numbers.
            error = fake_quantized(model.network, part)(*few.inputs()).double() - exact
            errors[name] = float(error.square().sum() / exact.square().sum())
            on_step("quantizing one layer alone", len(errors), len(alone))
    return errors


def some_of_each_step(data: CalibrationSet, count: int) -> CalibrationSet:
    """Return `count` samples of each step, evenly spread: with guidance, the first half of them is unconditional."""
    members = [(data.step == s).nonzero()[:, 0] for s in torch.unique(data.step)]
    return data.take(torch.cat([m[torch.linspace(0, len(m) - 1, min(count, len(m))).round().long()] for m in members]))
