"""Activation grids of each step, on what the quantized network itself draws (PCR, arXiv 2311.06322).

Ranges are otherwise observed on images that the float network drew. The quantized network drifts away from those, a
little further at every step. Here the trajectory of the quantized network is followed: at each step, with all earlier
ones quantized, the ranges are observed, the step's grids are made from them, and the step is taken with those grids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from calib import ranges
from calib.attention import OPERANDS, intercept_attention
from calib.config import ActivationConfig
from calib.data import NO_CONDITION, CalibrationSet
from calib.fakequant import fake_quantized, round_input, rounder
from calib.plan import ProductQuant, QuantPlan
from calib.ranges import Reach
from calib.step_bits import at_bits


class ObservingNetwork:
    """A network to sample with that makes its grids as it goes; `plan` has them once all steps are taken.

    Args:
        model: the float network.
        plan: its plan, with grids of each step; only its weights are used.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan) -> None:
        self._plan = plan
        self._network = fake_quantized(model, plan, activations=False)
        self._seen: dict[int, dict[tuple[str, str], Reach]] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor] = NO_CONDITION, /) -> Tensor:
        """Observe the ranges of this step, and predict the noise with activations rounded to grids of them.

        Args:
            x: (N, C, H, W), all of one step.
            t: (N,) its timestep.
            cond: conditions by name, (N, ...) each.

        Returns:
            The predicted noise (N, C, H, W).
        """
        plan, activation = self._plan, self._plan.config.activation
        data = CalibrationSet(x=x, t=t, step=torch.zeros_like(t), cond=cond, device=x.device)
        # All of them count for number 0: this call is of one step alone.
        batches = [(0, index) for index in torch.split(torch.arange(len(x)), activation.batch)]
        observed = ranges.observe(
            self._network, list(plan.layers), list(plan.products), data, batches, activation, lambda done: None
        )
        self._seen[int(t[0])] = {key: reach for key, (reach,) in observed.items()}
        step = _with_grids(plan, {key: (reach,) for key, reach in self._seen[int(t[0])].items()}, activation)
        if plan.step_bits is not None and plan.timesteps is not None:
            step = at_bits(step, plan.step_bits.bits[int(ranges.nearest_step(plan.timesteps, t[:1]))])
        return self._predict(step, data)

    @property
    def plan(self) -> QuantPlan:
        """The plan with the grids of this trajectory, one for each timestep that was met."""
        met = sorted(self._seen)  # rising, as a plan's timesteps are; sampling meets them falling
        reaches = {key: tuple(self._seen[t][key] for t in met) for key in self._seen[met[0]]}
        plan = _with_grids(self._plan, reaches, self._plan.config.activation)
        return replace(plan, timesteps=torch.tensor(met, dtype=torch.int64))

    @torch.no_grad()
    def _predict(self, plan: QuantPlan, data: CalibrationSet) -> Tensor:
        # Hooks for this call alone: the next step has other grids, and is observed without any.
        handles = []
        for name, layer in plan.layers.items():
            handles.append(round_input(self._network.get_submodule(name), name, layer.input))
        for name, product in plan.products.items():
            handles += intercept_attention(self._network.get_submodule(name), partial(_operand, name, product))
        try:
            out: Tensor = self._network(*data.inputs())
        finally:
            for handle in handles:
                handle.remove()
        return out


def _operand(name: str, product: ProductQuant, operand: str, x: Tensor) -> Tensor:
    return rounder(name, getattr(product, operand), device=x.device)(x)


def _with_grids(
    plan: QuantPlan, reaches: Mapping[tuple[str, str], Sequence[Reach]], config: ActivationConfig
) -> QuantPlan:
    """Return the plan with grids over `reaches`, which have one reach for each of its steps."""
    grids = {name: ranges.make_grids(reaches[name, "input"], config) for name in plan.layers}
    layers = {
        name: replace(layer, input=grids[name][0], narrower=grids[name][1:]) for name, layer in plan.layers.items()
    }
    products = {
        name: ProductQuant(
            **{
                o: ranges.make_operand_grid(reaches[name, o], o, config.bits, log2=product.probability.log2)
                for o in OPERANDS
            }
        )
        for name, product in plan.products.items()
    }
    return replace(plan, layers=layers, products=products)
