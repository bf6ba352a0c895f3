"""Activation ranges, against a case worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from calib.affine import fake_quantize
from calib.config import ActivationConfig
from calib.data import CalibrationSet
from calib.plan import Grid
from calib.ranges import Reach, draw_batches, ema, make_grid, nearest_step, observe, symmetric_scale


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def _values(*values: float, t: tuple[int, ...] | None = None) -> CalibrationSet:
    """Return one-pixel images of these values; images of the same `t` are of the same step."""
    times = torch.tensor(t or [0] * len(values))
    return CalibrationSet(x=torch.tensor(values)[:, None, None, None], t=times, step=1000 - times)


def _observe(
    data: CalibrationSet, config: ActivationConfig, seed: int = 5
) -> tuple[tuple[Reach, ...], tuple[Reach, ...]]:
    """Return how far the layer's input reaches below and above 0, and its output."""
    batches = draw_batches(data, config, torch.Generator().manual_seed(seed))
    seen = observe(_Twice(), ["layer"], [], data, batches, config, lambda done: None)
    return seen["layer", "input"], seen["layer", "output"]


def test_the_average_of_three_batches_is_the_one_worked_by_hand() -> None:
    data = _values(1.0, -3.0, 2.0)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(5))
    below = above = None
    for i in order:
        value = float(data.x[i])
        below, above = ema(below, max(-value, 0.0), 0.5), ema(above, max(value, 0.0), 0.5)
    seen = _observe(data, ActivationConfig(momentum=0.5, batch=1))
    assert seen == ((pytest.approx((below, above)),), (pytest.approx((2 * below, 2 * above)),))


@pytest.mark.parametrize("seed", range(3))
def test_minmax_keeps_the_largest_of_all_batches_in_whatever_order(seed: int) -> None:
    seen = _observe(_values(1.0, -3.0, 2.0), ActivationConfig(rule="minmax", batch=1), seed)
    assert seen == (((3.0, 2.0),), ((6.0, 4.0),))


def test_each_step_has_an_average_of_its_own_batches_alone() -> None:
    data = _values(4.0, -8.0, 4.0, -8.0, 4.0, 4.0, t=(7, 90, 7, 90, 7, 7))
    seen = _observe(data, ActivationConfig(momentum=0.75, batch=2, per_step=True))
    assert seen == (((0.0, 4.0), (8.0, 0.0)), ((0.0, 8.0), (16.0, 0.0)))
    data = _values(4.0, -8.0, -2.0, t=(7, 90, 90))
    seen = _observe(data, ActivationConfig(momentum=0.75, batch=1, per_step=True))
    assert seen[0] in [((0.0, 4.0), (0.75 * a + 0.25 * b, 0.0)) for a, b in ((8, 2), (2, 8))]


@pytest.mark.parametrize(("batches", "a_step"), [(None, 3), (9, 3), (4, 2), (5, 2), (1, 1)])
def test_batches_are_split_evenly_over_the_steps_and_none_goes_without(batches: int | None, a_step: int) -> None:
    data = _values(*[1.0] * 10, t=(0,) * 5 + (3,) * 5)
    drawn = draw_batches(data, ActivationConfig(batch=2, batches=batches, per_step=True), torch.Generator())
    assert [k for k, _ in drawn] == [0] * a_step + [1] * a_step
    for k, index in drawn:
        assert (data.t[index] == (0, 3)[k]).all()
    assert len(torch.cat([index for _, index in drawn]).unique()) == min(10, 4 * a_step)


def test_a_timestep_without_a_range_takes_the_nearest_ones() -> None:
    t = torch.tensor([0, 5, 6, 10, 44, 46, 999])
    assert nearest_step(torch.tensor([0, 10, 80]), t).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_the_scale_puts_the_largest_code_on_the_magnitude() -> None:
    assert symmetric_scale(12.7, 8) == pytest.approx(0.1)
    assert symmetric_scale(7.0, 4) == 1.0


def test_a_layer_that_only_sees_zeros_still_has_a_positive_scale() -> None:
    assert symmetric_scale(0.0, 8) > 0


def test_a_grid_for_values_on_one_side_of_0_has_its_zero_at_the_end_and_half_the_step() -> None:
    assert make_grid([(0.0, 25.5)], 8, symmetric=True) == Grid(scale=symmetric_scale(25.5, 8), bits=8)
    moved = make_grid([(0.0, 25.5)], 8, symmetric=False)
    assert moved == Grid(scale=pytest.approx(0.1, rel=1e-4), bits=8, zero=(-128,))
    assert make_grid([(2.0, 1.0)], 2, symmetric=False) == Grid(scale=1.0, bits=2, zero=(0,))


def test_zero_stays_in_the_middle_where_moving_it_would_gain_little() -> None:
    assert make_grid([(0.9, 1.0)], 8, symmetric=False) == make_grid([(0.9, 1.0)], 8, symmetric=True)


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(3, 8))
def test_a_moved_grid_holds_0_exactly_and_reaches_both_ends_to_within_a_step(
    below: float, above: float, bits: int
) -> None:
    grid = make_grid([(below, above)], bits, symmetric=False)
    scale, shift = torch.tensor(grid.scale), torch.tensor(grid.scale) * torch.tensor(grid.zero)
    assert shift.double() == torch.tensor(grid.scale, dtype=torch.float64) * grid.zero[0]
    values = torch.tensor([0.0, -below, above])
    rounded = fake_quantize(values, scale, bits, shift)
    assert rounded[0] == 0
    assert ((rounded - values).abs() <= 1.01 * grid.scale).all()


def test_with_steps_the_widest_one_has_ratio_1_and_each_has_a_zero() -> None:
    grid = make_grid([(0.0, 25.5), (1.0, 50.0)], 8, symmetric=False)
    assert grid.ratio == (pytest.approx(0.5, rel=1e-3), 1.0)
    assert grid.zero == (-128, -123)
