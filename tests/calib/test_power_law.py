"""Probabilities inside attention: which law they follow, and powers of two for those with a heavy tail."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from calib import power_law, ranges
from calib.affine import round_log2
from calib.attention import intercept_attention
from calib.calibrate import calibrate
from calib.config import ActivationConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized


def test_the_ratio_is_what_both_laws_give_by_hand() -> None:
    x, m = (4.0, 6.0), 3.0  # the values above the mean of 1, 1, 4, 6
    a = 1 + 2 / (math.log(4 / m) + math.log(6 / m))
    rate = 1 / (5 - m)
    power = [math.log((a - 1) / m) - a * math.log(v / m) for v in x]
    exponential = [math.log(rate) - rate * (v - m) for v in x]
    expected = (sum(power) - sum(exponential)) / 2
    assert power_law.log_likelihood_ratio(torch.tensor([1.0, 1.0, 4.0, 6.0])) == pytest.approx(expected, rel=1e-12)


def test_its_sign_tells_a_power_law_from_an_exponential() -> None:
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert power_law.log_likelihood_ratio(uniform.pow(-1 / 1.5)) > 0.05  # density x^-2.5
    assert power_law.log_likelihood_ratio(-uniform.log()) < -0.05
    assert power_law.log_likelihood_ratio(torch.full((9,), 0.125)) == 0
    assert power_law.log_likelihood_ratio(torch.zeros(9)) == 0


def test_powers_of_two_are_the_nearest_in_the_logarithm() -> None:
    x = torch.rand(2000, generator=torch.Generator().manual_seed(1)).clamp(min=1e-3)
    rounded = round_log2(x, 1.0, 4)
    assert set(rounded.log2().tolist()) <= {-float(k) for k in range(16)}
    assert float((rounded.log2() - x.log2()).abs().max()) <= 0.5 + 1e-6
    assert round_log2(torch.tensor([0.0, 1e-9]), 0.5, 4).tolist() == [0.5 * 2**-15] * 2


class _Attention(nn.Module):
    """Attention whose logits are `sharpness` times its input."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.sharpness * x, x, x)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))
        self.flat, self.sharp = _Attention(0.02), _Attention(8.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(self.middle(self.flat(h) + self.sharp(h)))
        return out


def test_a_plan_has_powers_of_two_where_the_tail_is_heavy_and_nowhere_else() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = _Net().eval(), torch.randn(8, 2, 64, 16)
    step = torch.arange(8) // 4
    data = CalibrationSet(x=x, t=step, step=step)
    config = QuantConfig(
        convention="tfmq",
        activation=ActivationConfig(bits=4, rule="minmax", per_step=True, logarithmic=True),
        reconstruction=ReconstructionConfig(iterations=0),
    )
    plan = calibrate(network, data, config, timesteps=2)
    chosen = {name: product.probability.log2 for name, product in plan.products.items()}
    assert chosen == {"flat": False, "sharp": True}
    assert plan.products["sharp"].probability == ranges.make_operand_grid([(0.0, 1.0)], "probability", 4, log2=True)
    seen: list[Tensor] = []
    fake = fake_quantized(network, plan)

    def note(operand: str, value: Tensor) -> Tensor:
        if operand == "probability":
            seen.append(value)
        return value

    intercept_attention(network.sharp, note)
    network(data.x, data.t)
    without = dataclasses.replace(plan, products={"flat": plan.products["flat"]})
    assert not torch.equal(fake(data.x, data.t), fake_quantized(network, without)(data.x, data.t))
    uniform = torch.round(seen[0] * 15) / 15  # as many codes
    logarithmic = round_log2(seen[0], 1.0, 4)
    small = seen[0] < 0.03
    assert (logarithmic - seen[0])[small].square().sum() < 0.5 * (uniform - seen[0])[small].square().sum()
