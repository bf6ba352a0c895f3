"""Step sizes learned from values: near the best that trying all finds, smooth or in groups, and used by a plan."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calib import step_scales
from calib.affine import fake_quantize
from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized

STEPS = 12


def _values() -> tuple[Tensor, Tensor]:
    """Return normal values whose spread falls smoothly by ten over the steps, and the steps' t."""
    t = torch.linspace(0, 0.95, STEPS)
    spread = 10 ** (t - 0.5)
    return torch.randn(STEPS, 2048, generator=torch.Generator().manual_seed(0)) * spread[:, None], t


def _best(values: Tensor, bits: int) -> Tensor:
    """Return the best of 400 sizes for each step, by trying them."""
    sizes = values.abs().amax(1) / (2 ** (bits - 1) - 1)
    tried = sizes[:, None] * torch.linspace(0.05, 1.2, 400)
    errors = torch.stack(
        [(values - fake_quantize(values, s[:, None], bits)).square().mean(1) for s in tried.T], 1
    )  # (S, 400)
    return tried[torch.arange(len(values)), errors.argmin(1)]


def _error(values: Tensor, sizes: Tensor, bits: int = 4) -> float:
    rounded = fake_quantize(values, sizes[:, None], bits)
    return float(((values - rounded).square().mean(1) / values.square().mean(1)).mean())


@pytest.mark.parametrize("rule", [step_scales.scales_by_network, step_scales.scales_by_groups])
def test_learned_sizes_come_near_the_best_and_beat_the_ranges(rule: Callable[..., Tensor]) -> None:
    values, t = _values()
    learned = rule(values, t, 4, torch.Generator().manual_seed(1))
    best, ranges = _error(values, _best(values, 4)), _error(values, values.abs().amax(1) / 7)
    assert _error(values, learned) < 1.15 * best < ranges


def test_groups_are_few_and_the_network_is_smooth() -> None:
    values, t = _values()
    sizes = step_scales.scales_by_groups(values, t, 4, torch.Generator())
    assert len(sizes.unique()) <= step_scales.GROUPS
    smooth = step_scales.scales_by_network(values, t, 4, torch.Generator().manual_seed(1))
    assert bool((smooth.diff() > 0).all())


def test_uncertain_steps_are_learned_from_first_and_none_is_forgotten() -> None:
    entropy, used = torch.linspace(0.0, 2.0, STEPS), torch.zeros(STEPS)
    first = step_scales.most_uncertain(entropy, used)
    assert sorted(first.tolist()) == list(range(STEPS // 2, STEPS))
    for _ in range(step_scales.ITERATIONS):
        used[step_scales.most_uncertain(entropy, used)] += 1
    assert used.sum() == step_scales.ITERATIONS * STEPS // 2
    assert bool((used.diff() >= 0).all())
    assert used[0] > step_scales.ITERATIONS / 5
    # where all are used equally often beside what their entropy is worth, as the penalty says
    assert float(used[-1] - used[0]) == pytest.approx(2.0 / step_scales.RISK, abs=2)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.tail = (nn.Conv2d(*size, 3, padding=1) for size in ((1, 4), (4, 4), (4, 1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.body(self.head(x) * (1 + t.reshape(-1, 1, 1, 1) / 10))
        out: Tensor = self.tail(self.body(h))  # called twice
        return out


def test_a_plan_has_a_size_for_each_step() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Net().eval()
    step = torch.arange(4).repeat_interleave(6)
    x = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    data = CalibrationSet(x=x, t=95 - 30 * step, step=step)
    config = QuantConfig(
        activation=ActivationConfig(bits=4, per_step=True, sizes="network"),
        reconstruction=ReconstructionConfig(iterations=0),
        omega=OmegaConfig(rule="uniform"),
    )
    plan = calibrate(net, data, config, timesteps=100)
    grid = plan.layers["body"].input
    assert grid.ratio is not None
    assert (len(grid.ratio), grid.zero, max(grid.ratio)) == (4, (0, 0, 0, 0), 1.0)
    assert list(grid.ratio) == sorted(grid.ratio)  # rising with t, as the network was made
    again = calibrate(net, data, config, timesteps=100)
    assert again.layers["body"].input == grid
    with torch.no_grad():
        assert torch.isfinite(fake_quantized(net, plan)(data.x, data.t)).all()
    with pytest.raises(CalibError, match="learned step scales, need a grid for each step"):
        dataclasses.replace(config, activation=ActivationConfig(sizes="groups"))
