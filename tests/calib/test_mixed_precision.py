"""Bits layer by layer: the program against brute force, sensitivities by hand, and a plan within its budget."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib import affine
from calib.calibrate import calibrate
from calib.config import ActivationConfig, MixedConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.cost import bit_operations, layer_macs, weight_bytes
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.mixed_precision import sensitivities, solve
from calib.plan import load_plan, save_plan


class _Net(nn.Module):
    """A convolution that matters (its output is scaled up) and one that hardly does, between two that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1)
        self.loud, self.quiet = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.head(x + t.reshape(-1, 1, 1, 1) / 100)
        out: Tensor = self.tail(self.loud(h) + 1e-3 * self.quiet(h))
        return out


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Net().eval()


def _data() -> CalibrationSet:
    x = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    step = torch.arange(3).repeat_interleave(4)
    return CalibrationSet(x=x, t=95 - 30 * step, step=step)


def _config(budget: float, unit: str = "bits") -> QuantConfig:
    return QuantConfig(
        activation=ActivationConfig(bits=8, rule="minmax", symmetric=True, batch=12),
        reconstruction=ReconstructionConfig(iterations=0),
        omega=OmegaConfig(rule="uniform"),
        mixed=MixedConfig(budget=budget, unit=unit, steps=3),
    )


def test_the_program_finds_what_trying_everything_finds() -> None:
    draw = random.Random(0)
    for _ in range(20):
        names, widths = "abcde", (4, 8, 32)
        costs = {n: {b: b * draw.uniform(1, 9) for b in widths} for n in names}
        errors = {n: {b: draw.random() / b for b in widths} for n in names}
        ways = [dict(zip(names, way, strict=True)) for way in itertools.product(widths, repeat=len(names))]
        budget = sum(min(cost.values()) for cost in costs.values()) * draw.uniform(1.1, 4)
        allowed = [way for way in ways if sum(costs[n][b] for n, b in way.items()) <= budget]
        best = min(allowed, key=lambda way: sum(errors[n][b] for n, b in way.items()))
        assert solve(errors, costs, budget) == best


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(CalibError, match=r"A budget of 7 MB cannot be kept: the fewest bits need 8\."):
        solve({"a": {4: 1.0, 8: 0.0}}, {"a": {4: 8, 8: 16}}, 7, "MB")


def test_a_layers_error_is_that_of_the_network_with_it_alone_quantized(net: nn.Module) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data, config = _data(), _config(5)
    measured = sensitivities(net, data, ["loud", "quiet"], config)
    assert measured["loud"].keys() == {4, 8, 32}
    assert measured["loud"][32] == 0
    assert measured["loud"][4] > 10 * measured["loud"][8] > 0
    assert measured["loud"][4] > 1e3 * measured["quiet"][4]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    other = _Net().eval()
    other.load_state_dict(before)
    with torch.no_grad():
        exact, seen = net(data.x, data.t), net.head(data.x + data.t.reshape(-1, 1, 1, 1) / 100)
        scale = affine.search_weight_scale(other.loud.weight, 4)
        other.loud.weight.copy_(affine.dequantize_weight(affine.quantize_weight(other.loud.weight, scale, 4), scale))
        reach = float(seen.abs().max()) / 127
        rounded = other.loud(torch.round(seen / reach).clamp(-128, 127) * reach)
        error = (other.tail(rounded + 1e-3 * other.quiet(seen)) - exact).square().flatten(1).sum(1)
        shares = error.reshape(3, 4).sum(1) / exact.square().flatten(1).sum(1).reshape(3, 4).sum(1)
    assert measured["loud"][4] == pytest.approx(float(shares.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "bits"), [(4, {"loud": 4, "quiet": 4}), (6, {"loud": 8, "quiet": 4}), (20, {"quiet": 8})]
)
def test_what_matters_gets_the_bits(net, budget: float, bits: dict[str, int], tmp_path: Path) -> None:
    plan = calibrate(net, _data(), _config(budget), timesteps=100)
    assert {name: layer.weight_bits for name, layer in plan.layers.items()} == bits
    if "loud" not in bits:
        assert plan.float_layers["loud"] == "left float within the budget, since it matters most"
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again.sensitivity == plan.sensitivity
    assert again.config == plan.config


def test_a_budget_for_everything_in_float_is_refused(net: nn.Module) -> None:
    with pytest.raises(CalibError, match="nothing is left to quantize"):
        calibrate(net, _data(), _config(40), timesteps=100)


def test_budgets_in_bytes_and_bit_operations_are_those_of_the_plan(net: nn.Module) -> None:
    """What the solver counts is what `calib.cost` counts of the plan that comes of it, for every assignment of two."""
    macs = layer_macs(net, (1, 6, 6), 100)
    for unit, measure in (
        ("MB", lambda plan: weight_bytes(net, plan) / 1e6),
        ("Gbit-ops", lambda plan: bit_operations(macs, plan) / 1e9),
    ):
        mixed = calibrate(net, _data(), _config(6), timesteps=100)
        exactly = measure(mixed)
        exact = calibrate(net, _data(), _config(exactly * (1 + 1e-9), unit), timesteps=100)
        assert measure(exact) == exactly
        less = calibrate(net, _data(), _config(exactly * (1 - 1e-6), unit), timesteps=100)
        assert measure(less) < exactly


def test_a_budget_of_milliseconds_shares_what_is_measured_by_multiplications(net: nn.Module) -> None:
    asked: list[object] = []

    def clock(network: nn.Module, layers: list[str], widths: tuple[int, ...]) -> dict[int, float]:
        asked.append((list(layers), widths))
        return {4: 10.0, 8: 12.0, 32: 30.0}

    def bits(milliseconds: float) -> dict[str, int]:
        plan = calibrate(net, _data(), _config(milliseconds, "ms"), timesteps=100, clock=clock)
        return {name: layer.weight_bits for name, layer in plan.layers.items()}

    # Both layers multiply equally often, so that each has half of the time, and "loud" matters more.
    assert bits(10.0) == {"loud": 4, "quiet": 4}
    assert bits(11.0) == {"loud": 8, "quiet": 4}
    assert bits(20.0) == {"quiet": 4}
    assert asked[0] == (["loud", "quiet"], (4, 8, 32))
    with pytest.raises(CalibError, match=r"A budget of 9 ms cannot be kept: the fewest bits need 10\."):
        bits(9.0)
    with pytest.raises(CalibError, match="needs a clock that measures them"):
        calibrate(net, _data(), _config(10, "ms"), timesteps=100)


def test_other_bits_do_not_take_up_blocks_of_these(net: nn.Module, tmp_path: Path) -> None:
    learned = dataclasses.replace(_config(6), reconstruction=ReconstructionConfig(iterations=2, batch=4))
    first = calibrate(net, _data(), learned, timesteps=100, folder=tmp_path)
    coarse = dataclasses.replace(learned, activation=ActivationConfig(bits=2, rule="minmax", batch=12))
    again = calibrate(net, _data(), coarse, timesteps=100, folder=tmp_path)
    fresh = calibrate(net, _data(), coarse, timesteps=100)
    for name, layer in fresh.layers.items():
        assert torch.equal(again.layers[name].codes, layer.codes)
    assert first.layers.keys()
