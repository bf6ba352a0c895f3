"""Scale search and quantizers, against brute force and properties."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.affine import dequantize_weight, fake_quantize, integer_range, quantize_weight, search_weight_scale


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=32),
    bits=st.integers(2, 8),
    scale=st.floats(0.015625, 8.0, width=32),
)
def test_a_value_inside_the_range_moves_by_at_most_half_a_step(values: list[float], bits: int, scale: float) -> None:
    x, s = torch.tensor(values, dtype=torch.float32), torch.tensor(scale)
    low, high = integer_range(bits)
    x = x.clamp(low * scale, high * scale)
    assert ((fake_quantize(x, s, bits) - x).abs() <= 0.5 * s * (1 + 1e-5)).all()


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=32), bits=st.integers(2, 8))
def test_quantizing_twice_changes_nothing(values: list[float], bits: int) -> None:
    x, scale = torch.tensor(values), torch.tensor(0.375)
    once = fake_quantize(x, scale, bits)
    assert torch.equal(fake_quantize(once, scale, bits), once)
    rows, scales = x[:, None], scale.expand(len(x))
    assert torch.equal(dequantize_weight(quantize_weight(rows, scales, bits), scales)[:, 0], once)


def test_the_scale_search_finds_the_best_candidate_of_every_channel() -> None:
    weight = (
        torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None, None, None]
    )
    scales = search_weight_scale(weight, 4)
    for channel, scale in zip(weight, scales, strict=True):
        candidates = channel.abs().max() / 7 * (1 - 0.01 * torch.arange(80))
        errors = torch.stack([(channel - fake_quantize(channel, c, 4)).abs().pow(2.4).mean() for c in candidates])
        assert torch.isclose(scale, candidates[errors.argmin()])


def test_a_channel_of_zeros_gets_a_positive_scale() -> None:
    weight = torch.zeros(2, 5)
    weight[1] = 1.0
    scale = search_weight_scale(weight, 4)
    assert scale[0] == 1
    assert torch.isfinite(fake_quantize(weight, scale[:, None], 4)).all()
