"""Which steps' samples calibrate weights: counts by hand, by the normal distribution, and by features."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import weight_samples
from calib.config import QuantConfig, SelectionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.selection import apportion, density, gaussian, select, step_features

STEPS, IMAGES = 10, 6


def _data() -> CalibrationSet:
    step = torch.arange(STEPS).repeat_interleave(IMAGES)
    x = torch.randn(STEPS * IMAGES, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return CalibrationSet(x=x, t=90 - 10 * step, step=step)


class _Net(nn.Module):
    """Down once and up again; its middle convolution sees 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 3, 2, stride=2)
        self.middle = nn.Conv2d(3, 3, 3, padding=1)
        self.up = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        small = self.middle(self.down(x) + 0 * t.reshape(-1, 1, 1, 1))
        return self.up(nn.functional.interpolate(small, scale_factor=2))


def _config(rule: str) -> QuantConfig:
    return QuantConfig(weight_steps=5, selection=SelectionConfig(rule=rule, images=2))


@pytest.mark.parametrize("rule", ["uniform", "gaussian", "density"])
def test_every_rule_takes_as_many_samples_the_same_every_time(rule: str) -> None:
    config, data, net = _config(rule), _data(), _Net()
    chosen = select(data, config, net)
    assert len(chosen) == 5 * IMAGES
    assert bool((chosen.step.diff() >= 0).all())
    assert torch.equal(chosen.x, select(data, config, net).x)
    rows = {row.sum().item() for row in data.x}
    taken = [row.sum().item() for row in chosen.x]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= rows
    parts = weight_samples(data, config, net)
    assert len(parts.train) + len(parts.validation) == 5 * IMAGES


def test_the_normal_distribution_is_counted_from_the_cleanest_step() -> None:
    """Four steps, mean 1 and deviation 1 step: the mass below 0.5, 0.5 to 1.5, 1.5 to 2.5 and above."""
    data = CalibrationSet(x=torch.zeros(4, 1, 1, 1), t=torch.tensor([30, 20, 10, 0]), step=torch.arange(4))
    shares = gaussian(data, SelectionConfig(mean=0.25, deviation=0.25), nn.Identity())
    expected = torch.tensor([0.0668, 0.2417, 0.3830, 0.3085])
    assert torch.allclose(shares, expected, atol=1e-4)


def test_the_gaussian_rule_draws_more_from_the_cleaner_steps() -> None:
    counts = torch.bincount(select(_data(), _config("gaussian"), _Net()).step, minlength=STEPS)
    assert counts[STEPS // 2 :].sum() > counts[: STEPS // 2].sum()


def test_features_are_what_the_middle_convolution_sees() -> None:
    data, net = _data(), _Net()
    features = step_features(data, 2, net)
    assert features.shape == (STEPS, 2, 3, 4, 4)
    third = data.take((data.step == 3).nonzero()[:2, 0])
    assert torch.allclose(features[3], net.down(third.x))
    with pytest.raises(CalibError, match="has none"):
        step_features(data, 2, nn.Identity())


class _Given(nn.Module):
    """Shows its convolution features that depend on t alone: the same at t <= 60, others above."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        far = (t > 60).float()[:, None] * torch.tensor([1.0, -3.0])
        return self.convolution((torch.ones(2) + far)[..., None, None].expand(x.shape))


def test_density_counts_the_steps_that_are_alike_and_variety_those_that_are_not() -> None:
    """Three steps of ten, the noisiest, differ: densities 3 and 7, varieties 7 and 3 times the same, by hand."""
    data, config = _data(), SelectionConfig(images=1, variety=0.0)
    alike = density(data, config, _Given())
    assert alike.tolist() == [0.0] * 3 + [1.0] * 7
    assert torch.allclose(density(data, replace(config, variety=2.0), _Given()), torch.tensor([2.0] * 3 + [1.0] * 7))


@pytest.mark.parametrize(
    ("shares", "total", "most", "expected"),
    [
        ([1.0, 1.0, 1.0], 7, [9, 9, 9], [3, 2, 2]),
        ([8.0, 1.0, 1.0], 9, [5, 5, 5], [5, 2, 2]),
        ([1.0, 0.0, 0.0], 6, [2, 2, 2], [2, 2, 2]),
        ([5.0, 4.0, 1.0], 8, [3, 3, 3], [3, 3, 2]),
    ],
)
def test_allotting(shares: list[float], total: int, most: list[int], expected: list[int]) -> None:
    assert apportion(torch.tensor(shares), total, torch.tensor(most)).tolist() == expected
