"""Activation ranges, against a case worked by hand."""

import pytest
import torch
from torch import nn

from calib.config import ActivationConfig
from calib.data import CalibrationSet
from calib.ranges import ema, observe, scale_of


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def _three() -> CalibrationSet:
    x = torch.tensor([1.0, -3.0, 2.0])[:, None, None, None]
    return CalibrationSet(x=x, t=torch.zeros(3, dtype=torch.int64), step=torch.zeros(3, dtype=torch.int64))


def test_the_average_of_three_batches_is_the_one_worked_by_hand() -> None:
    data = _three()
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(5))
    expected = None
    for i in order:
        expected = ema(expected, abs(float(data.x[i])), 0.5)
    config = ActivationConfig(momentum=0.5, batch=1)
    seen = observe(_Twice(), ["layer"], data, config, generator, lambda done: None)["layer"]
    assert seen.input == pytest.approx(expected)
    assert seen.output == pytest.approx(2 * expected)


@pytest.mark.parametrize("seed", range(3))
def test_minmax_keeps_the_largest_of_all_batches_in_whatever_order(seed: int) -> None:
    config, generator = ActivationConfig(rule="minmax", batch=1), torch.Generator().manual_seed(seed)
    seen = observe(_Twice(), ["layer"], _three(), config, generator, lambda done: None)["layer"]
    assert (seen.input, seen.output) == (3.0, 6.0)


def test_the_scale_puts_the_largest_code_on_the_magnitude() -> None:
    assert scale_of(12.7, 8) == pytest.approx(0.1)
    assert scale_of(7.0, 4) == 1.0


def test_a_layer_that_only_sees_zeros_still_has_a_positive_scale() -> None:
    assert scale_of(0.0, 8) > 0
