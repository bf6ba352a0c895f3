"""SQNR: the same decibels from tensors as from powers, and a value where there is no noise."""

import math

import pytest
import torch

from calib.sqnr import EQUAL_DB, ratio_db, sqnr_db


def test_decibels_are_ten_times_the_logarithm_of_the_power_ratio() -> None:
    exact, quantized = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr_db(exact, quantized) == pytest.approx(10 * math.log10(25 / 0.25), abs=1e-9)
    assert ratio_db(25.0, 0.25) == pytest.approx(20.0, abs=1e-12)


def test_the_power_is_summed_in_float64() -> None:
    exact = torch.full((1 << 22,), 1.0)
    assert sqnr_db(exact, exact * (1 - 2**-10)) == pytest.approx(10 * math.log10(2**20), abs=1e-6)


def test_equal_tensors_have_a_finite_value() -> None:
    assert sqnr_db(torch.ones(4), torch.ones(4)) == EQUAL_DB
    assert math.isfinite(ratio_db(1.0, 0.0))


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 3.0])
def test_tensors_and_powers_agree(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, generator=generator)
    quantized = exact + scale * torch.randn(50, generator=generator)
    noise = (exact.double() - quantized.double()).square().sum()
    assert sqnr_db(exact, quantized) == pytest.approx(ratio_db(float(exact.double().square().sum()), float(noise)))
