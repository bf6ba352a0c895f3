"""Soft rounding, its start, its hardening and its annealing."""

import pytest
import torch

from calib import adaround
from calib.affine import search_weight_scale


def _layer(bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return weight, search_weight_scale(weight, bits)


def test_at_the_start_the_soft_weight_is_the_float_weight_clipped_to_the_grid() -> None:
    weight, scale = _layer()
    soft = adaround.soft_weight(weight, scale, adaround.initial_logits(weight, scale), 4)
    step = scale[:, None, None, None]
    assert torch.allclose(soft, weight.clamp(-8 * step, 7 * step), atol=1e-6)


def test_hard_rounding_never_moves_a_weight_inside_the_grid_by_more_than_one_step() -> None:
    weight, scale = _layer()
    logits = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    codes = adaround.hard_codes(weight, scale, logits, 4)
    grid = (weight / scale[:, None, None, None]).clamp(-8, 7)
    assert ((codes - grid).abs() <= 1).all()
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_the_sign_of_the_logit_decides_up_or_down() -> None:
    weight, scale = torch.tensor([[0.3, 0.7]]), torch.tensor([1.0])
    assert adaround.hard_codes(weight, scale, torch.tensor([[2.0, -2.0]]), 4).tolist() == [[1, 0]]


def test_decided_logits_cost_nothing_and_undecided_ones_cost_one() -> None:
    assert adaround.regulariser(torch.tensor([10.0, -10.0]), 20.0) == 0
    assert adaround.regulariser(torch.tensor([0.0]), 2.0) == 1


@pytest.mark.parametrize(("iteration", "expected"), [(0, None), (19, None), (20, 20.0), (60, 11.0), (99, 2.225)])
def test_beta_is_off_in_the_warm_up_and_then_falls_linearly(iteration: int, expected: float | None) -> None:
    assert adaround.beta(iteration, 100, 0.2, 20.0, 2.0) == (expected and pytest.approx(expected))


def test_soft_rounding_has_the_derivative_of_finite_differences() -> None:
    logits = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adaround.soft_rounding, (logits,))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_rounding_has_autograds_values_and_gradients_to_the_bit(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    layer = adaround.LayerWeight(key="weight", weight=weight, scale=torch.full((6,), 0.3), bits=bits)
    logits = 3 * torch.randn(weight.shape, generator=generator)  # some of them beyond where h(V) is flat
    upstream = torch.randn(weight.shape, generator=generator)
    rounding = adaround.LearnedRounding(layer, logits)
    point = logits.clone().requires_grad_()
    expected = adaround.soft_weight(weight, layer.scale, point, bits)
    assert torch.equal(rounding.weight, expected)
    for sharpness in (None, 20.0, 2.5):
        loss = (upstream * expected).sum() + (0.01 * adaround.regulariser(point, sharpness) if sharpness else 0)
        gradient = torch.autograd.grad(loss, point, retain_graph=True)[0]
        rounding.backward(upstream.clone(), 0.01, sharpness)
        assert rounding.logits.grad is not None
        assert torch.equal(rounding.logits.grad, gradient)


def test_learned_rounding_follows_its_logits() -> None:
    layer = adaround.LayerWeight(key="weight", weight=torch.tensor([[0.25]]), scale=torch.tensor([1.0]), bits=4)
    rounding = adaround.LearnedRounding(layer, torch.tensor([[0.0]]))
    assert rounding.weight.item() == 0.5
    rounding.logits.fill_(9.0)
    rounding.update()
    assert rounding.weight.item() == 1.0
