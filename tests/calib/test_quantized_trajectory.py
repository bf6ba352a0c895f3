"""Grids on the trajectory of the quantized network: each step's ranges are those that the steps before it lead to."""

import dataclasses

import pytest
import torch
from torch import Tensor

from calib import ranges
from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from calib.quantized_trajectory import ObservingNetwork


def _config() -> QuantConfig:
    return QuantConfig(
        convention="tfmq",
        activation=ActivationConfig(bits=4, rule="minmax", per_step=True, trajectory="quantized", batch=8),
        reconstruction=ReconstructionConfig(iterations=0),
        omega=OmegaConfig(rule="uniform"),
    )


@pytest.fixture
def plan(tiny_unet_module) -> QuantPlan:
    x = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    step = torch.arange(3).repeat_interleave(8)
    data = CalibrationSet(x=x, t=95 - 40 * step, step=step)
    return calibrate(tiny_unet_module, data, _config(), timesteps=100)


@pytest.fixture
def tiny_unet_module(tiny_unet):
    from gaq_export.models.architectures import EpsilonModel

    return EpsilonModel(tiny_unet)


def test_following_the_sampler_by_hand_gives_the_same_grids(tiny_unet_module, plan: QuantPlan) -> None:
    network, visited = ObservingNetwork(tiny_unet_module, plan), (95, 55, 15)
    weights_only = fake_quantized(tiny_unet_module, plan, activations=False)
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    reaches: list[dict[tuple[str, str], ranges.Reach]] = []
    for t in visited:
        times = torch.full((8,), t)
        out = network(x, times)
        seen = _reaches(weights_only, plan, x, times)
        reaches.append(seen)
        grids = {name: ranges.make_grid([seen[name, "input"]], 4, symmetric=False) for name in plan.layers}
        alone = dataclasses.replace(
            plan,
            timesteps=None,
            layers={n: dataclasses.replace(layer, input=grids[n]) for n, layer in plan.layers.items()},
            products={
                n: dataclasses.replace(
                    p,
                    **{
                        o: ranges.make_operand_grid([seen[n, o]], o, 4)
                        for o in ("query", "key", "value", "probability")
                    },
                )
                for n, p in plan.products.items()
            },
        )
        with torch.no_grad():
            assert torch.equal(out, fake_quantized(tiny_unet_module, alone)(x, times))
        x = x - 0.3 * out
    new = network.plan
    assert new.timesteps is not None
    assert new.timesteps.tolist() == sorted(visited)
    for name, layer in new.layers.items():
        steps = [seen[name, "input"] for seen in reversed(reaches)]  # by rising timestep
        assert layer.input == ranges.make_grid(steps, 4, symmetric=False)
        assert torch.equal(layer.codes, plan.layers[name].codes)
    with torch.no_grad():  # and the plan can be used
        assert torch.isfinite(fake_quantized(tiny_unet_module, new)(x, torch.full((8,), 95))).all()


def _reaches(network, plan: QuantPlan, x: Tensor, t: Tensor) -> dict[tuple[str, str], ranges.Reach]:
    data = CalibrationSet(x=x, t=t, step=torch.zeros_like(t))
    observed = ranges.observe(
        network,
        list(plan.layers),
        list(plan.products),
        data,
        [(0, torch.arange(len(x)))],
        plan.config.activation,
        lambda done: None,
    )
    return {key: reach for key, (reach,) in observed.items()}


def test_it_needs_grids_of_each_step() -> None:
    with pytest.raises(CalibError, match="need a grid for each step: set `per_step`"):
        dataclasses.replace(_config(), activation=ActivationConfig(trajectory="quantized"))
