"""The quantized network in PyTorch: what a scale for each step does to a sample, and that samples do not mix."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import ActivationConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import Grid, LayerQuant, QuantPlan
from gaq_export.models.architectures import EpsilonModel

PER_STEP = QuantConfig(
    activation=ActivationConfig(batch=4, per_step=True), reconstruction=ReconstructionConfig(iterations=0)
)


class Wide(nn.Module):
    """A layer in the middle that multiplies by one; with `mixed`, its first axis is not the batch."""

    def __init__(self, *, mixed: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(2, 2, bias=False) for _ in range(3))
        for layer in (self.first, self.middle, self.last):
            nn.init.eye_(layer.weight)
        self.mixed = mixed

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        h = self.middle(h.transpose(0, 1)).transpose(0, 1) if self.mixed else self.middle(h)
        out: Tensor = self.last(h)
        return out


def plan_by_hand() -> QuantPlan:
    """Quantize the middle layer: 3 bits, codes -4 to 3, a step of 0.5 at t = 10 and of 1 at t = 40."""
    layer = LayerQuant(
        codes=torch.eye(2, dtype=torch.int8),
        weight_scale=torch.ones(2),
        weight_bits=8,
        input=Grid(scale=1.0, bits=3, zero=(0, 0), ratio=(0.5, 1.0)),
        output_scale=1.0,
    )
    return QuantPlan(
        layers={"middle": layer},
        products={},
        float_layers={},
        blocks=(),
        scores=torch.ones(1),
        config=QuantConfig(),
        provenance={},
        num_train=50,
        timesteps=torch.tensor([10, 40]),
    )


def test_each_sample_is_rounded_with_the_scale_of_its_own_step_or_the_nearest_one() -> None:
    x = torch.tensor([0.7, 9.0]).expand(4, 1, 2, 2)
    out = fake_quantized(Wide(), plan_by_hand())(x, torch.tensor([10, 40, 0, 26]))
    assert out[:, 0, 0].tolist() == [[0.5, 1.5], [1.0, 3.0], [0.5, 1.5], [1.0, 3.0]]


def test_a_batch_of_mixed_timesteps_is_what_its_samples_are_alone(tiny_unet) -> None:
    network = EpsilonModel(tiny_unet)
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 5, 30, 30, 60, 60, 95, 95])
    plan = calibrate(network, CalibrationSet(x=x, t=t, step=t), PER_STEP, timesteps=100)
    fake, mixed = fake_quantized(network, plan).double(), torch.tensor([95, 5, 47, 60])
    with torch.no_grad():
        together = fake(x[::2].double(), mixed)
        alone = torch.cat([fake(x[2 * i, None].double(), mixed[i, None]) for i in range(4)])
        other = fake(x[::2].double(), mixed.flip(0))
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)
    assert not torch.allclose(together, other, rtol=0, atol=1e-3)


def test_a_layer_that_cannot_tell_the_samples_apart_has_no_range_for_each_step() -> None:
    x = torch.randn(8, 4, 6, 2, generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(x=x, t=torch.arange(8) // 2, step=torch.arange(8) // 2)
    refused = r"Layer 'middle' is called with an input whose first axis is not the batch.*--keep-float 'middle'"
    with pytest.raises(CalibError, match=refused):
        calibrate(Wide(mixed=True), data, PER_STEP, timesteps=50)
    shared = replace(PER_STEP, activation=ActivationConfig())
    assert set(calibrate(Wide(mixed=True), data, shared, timesteps=50).layers) == {"middle"}
    with pytest.raises(CalibError, match=r"'middle' got 4 rows for 8 samples: the steps of the rows are unknown"):
        fake_quantized(Wide(mixed=True), plan_by_hand())(x, data.t)
