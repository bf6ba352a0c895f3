"""What the sampler takes back of a quantized network's error is what the error was made of."""

import json

import pytest
import torch

from calib.correction import Correction, channel_gain, regress
from calib.errors import CalibError
from calib.records import parse_record

BIAS = torch.tensor([0.02, -0.01, 0.0])


def _error(epsilon: torch.Tensor, k: float, sigma: float) -> torch.Tensor:
    noise = torch.randn(epsilon.shape, generator=torch.Generator().manual_seed(2))
    return k * epsilon + BIAS.reshape(1, -1, 1, 1) + sigma * noise


@pytest.fixture
def epsilon() -> torch.Tensor:
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.01, 0.1])
@pytest.mark.parametrize("k", [0.0, 0.05, 0.3])
def test_the_parts_of_a_known_error_are_recovered(k: float, sigma: float, epsilon: torch.Tensor) -> None:
    regression = regress(epsilon, _error(epsilon, k, sigma))
    assert regression.k == pytest.approx(k, abs=3 * sigma / epsilon.numel() ** 0.5 + 1e-6)
    total = BIAS + k * epsilon.mean((0, 2, 3))
    assert torch.allclose(regression.bias.float(), total, atol=4 * sigma / (64 * 1024) ** 0.5 + 1e-6)
    spread = (sigma**2 + float(BIAS.var(correction=0))) ** 0.5  # within an image, channels differ by their biases
    assert regression.sigma == pytest.approx(spread, rel=0.01)
    assert regression.explained == pytest.approx(k**2 / (k**2 + spread**2), abs=0.01)


def test_an_error_against_the_noise_is_no_gain(epsilon: torch.Tensor) -> None:
    regression = regress(epsilon, _error(epsilon, -0.1, 0.01))
    assert regression.k == 0.0
    assert regression.explained > 0.8
    assert regression.sigma > 0.09


def _objective(k: torch.Tensor, q: torch.Tensor, r: torch.Tensor, relative: float, ridge: float, size: int) -> float:
    plain, scaled = (k * q - r).square().sum(), ((k * q - r) / r).square().sum()
    return float((1 - relative) * plain + relative * size * scaled + ridge * size * (k - 1) ** 2)


@pytest.mark.parametrize(("relative", "ridge"), [(0.5, 0.1), (0.0, 0.0), (0.8, 0.0), (0.0, 1.0)])
def test_the_gain_of_a_channel_has_the_least_error(relative: float, ridge: float, epsilon: torch.Tensor) -> None:
    r = epsilon[:1].double()
    q = 1.2 * r + 0.05 * torch.randn(r.shape, generator=torch.Generator().manual_seed(3)).double()
    gain = channel_gain(q, r, relative=relative, ridge=ridge)
    for channel in range(3):
        a, b = q[0, channel].flatten(), r[0, channel].flatten()
        counts = a.abs() > a.abs().mean()
        values = [
            _objective(gain[channel] + offset, a[counts], b[counts], relative, ridge, r[0].numel())
            for offset in (-1e-3, 0.0, 1e-3)
        ]
        assert values[1] == min(values)
    if ridge == 0.0:
        assert torch.allclose(gain, torch.full((3,), 1 / 1.2).double(), atol=0.01)


def test_where_nothing_counts_nothing_is_corrected() -> None:
    assert channel_gain(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)).tolist() == [1.0, 1.0, 1.0]


def test_a_correction_survives_json() -> None:
    made = Correction(
        rule="ptqd",
        gain=((0.1 + 0.2, 1.0),),
        bias=((1e-9, 0.0),),
        shift=((0.0, 0.0),),
        variance=(0.25,),
        explained=(0.5,),
    )
    assert parse_record(Correction, json.dumps(made.to_json()), "plan.json", "Again") == made
    with pytest.raises(CalibError, match="expected a correction with as many steps and channels in each table"):
        parse_record(Correction, json.dumps(made.to_json() | {"bias": [[0.0]]}), "plan.json", "Again")
