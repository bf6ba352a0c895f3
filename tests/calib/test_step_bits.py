"""Activation bits of each step: who gets how many, and that each step is rounded with the bits that it gets."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib import step_bits
from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, StepBits, load_plan, save_plan
from gaq_export.models.architectures import EpsilonModel

TIMES = torch.tensor([15, 55, 95])


def _data() -> CalibrationSet:
    x = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    step = torch.arange(3).repeat_interleave(8)
    return CalibrationSet(x=x, t=95 - 40 * step, step=step)


@pytest.fixture(scope="module")
def network(make_tiny_unet) -> EpsilonModel:
    return EpsilonModel(make_tiny_unet())


@pytest.fixture(scope="module", params=["shared", "per step", "learned"])
def plan(request, network: EpsilonModel) -> QuantPlan:
    kinds = {"shared": {}, "per step": {"per_step": True}, "learned": {"per_step": True, "sizes": "groups"}}
    config = QuantConfig(
        convention="tfmq",
        activation=ActivationConfig(bits=8, narrower=(4,), batch=8, **kinds[request.param]),
        reconstruction=ReconstructionConfig(iterations=0),
        omega=OmegaConfig(rule="uniform"),
    )
    return calibrate(network, _data(), config, timesteps=100)


def _db(exact: Tensor, quantized: Tensor) -> float:
    return 10 * math.log10(float(exact.double().square().sum() / (quantized.double() - exact.double()).square().sum()))


def test_the_fewest_bits_that_have_more_signal_than_the_image_are_taken() -> None:
    measured = {8: [30.0, 20.0, 31.0, 10.0], 4: [12.0, 9.0, 14.0, 9.9], 6: [20.0, 15.0, 30.0, 10.0]}
    assert step_bits.fewest([11.0, 14.0, 30.0, 10.0], measured) == (4, 6, 8, 8)  # more, and not as much


def test_a_window_keeps_the_most_bits(plan: QuantPlan) -> None:
    plan = dataclasses.replace(plan, timesteps=torch.arange(10))
    assert step_bits.by_window(plan, (0.8, 1.0)).bits == (8, 8) + (4,) * 8  # the last steps have the smallest t
    assert step_bits.by_window(plan, (0.0, 0.3)).bits == (4,) * 7 + (8, 8, 8)


def test_signal_over_noise_is_what_each_width_has_alone(network: EpsilonModel, plan: QuantPlan) -> None:
    data = _data()
    assigned = step_bits.by_ratio(network, plan, data, (0.0, 1000.0, 20.0))
    with torch.no_grad():
        for bits in (4, 8):
            alone = fake_quantized(network, step_bits.at_bits(plan, bits))
            for k, t in enumerate(TIMES):
                at = data.take((data.t == t).nonzero()[:, 0])
                assert assigned.measured_db[bits][k] == pytest.approx(_db(network(at.x, at.t), alone(at.x, at.t)))
    assert all(wide > narrow for wide, narrow in zip(assigned.measured_db[8], assigned.measured_db[4], strict=True))
    assert assigned.bits[:2] == (4, 8)
    assert assigned.bits[2] == (4 if assigned.measured_db[4][2] > 20 else 8)


def test_a_plan_rounds_each_step_with_the_bits_of_that_step(network: EpsilonModel, plan: QuantPlan) -> None:
    mixed = fake_quantized(network, dataclasses.replace(plan, step_bits=StepBits(bits=(8, 4, 4))))
    x = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([15, 55, 95, 0, 60, 99])  # those between take the nearest step's
    with torch.no_grad():
        out = mixed(x, t)
        by_width = {bits: fake_quantized(network, step_bits.at_bits(plan, bits))(x, t) for bits in (4, 8)}
    for k, bits in enumerate((8, 4, 4, 8, 4, 4)):
        torch.testing.assert_close(out[k], by_width[bits][k], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out[k], by_width[12 - bits][k], rtol=1e-4, atol=1e-5)


def test_it_is_saved_with_the_plan(plan: QuantPlan, tmp_path: Path) -> None:
    bits = StepBits(bits=(8, 4, 4), required_db=(1.5, 2.0, 3.0), measured_db={8: (9.0, 9.5, 9.0), 4: (1.0, 4.0, 5.0)})
    save_plan(dataclasses.replace(plan, step_bits=bits), tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again.step_bits == bits
    assert all(again.layers[name].narrower == layer.narrower for name, layer in plan.layers.items())
    assert {layer.input.bits for layer in step_bits.at_bits(again, 4).layers.values()} == {4}


def test_what_does_not_go_together_is_refused(plan: QuantPlan) -> None:
    with pytest.raises(CalibError, match=r"grids of \[8, 4\] bits, and none of 6"):
        step_bits.at_bits(plan, 6)
    with pytest.raises(CalibError, match=r"Found \[8\] as activation bits beside 8; choose 2 to fewer"):
        QuantConfig(activation=ActivationConfig(bits=8, narrower=(8,)))
    with pytest.raises(CalibError, match=r"learned with the rounding \('qdrop'\) have one width"):
        QuantConfig(
            activation=ActivationConfig(bits=8, narrower=(4,)),
            reconstruction=ReconstructionConfig(activations="qdrop"),
        )
