"""Uniform quantizers as pure functions.

A real value x is stored as the integer q = clamp(round(x / scale), low, high) and read back as q * scale; the zero
point is 0, which is what every engine's fast path wants. A grid that lies elsewhere is the same one behind a shift by
scale * zero, undone afterwards. Division and round-half-to-even are ONNX QuantizeLinear's, so that a fake-quantized
module and the exported graph agree bit for bit.
"""

import torch
from torch import Tensor

FLOAT8_LARGEST = 448.0


def integer_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest code.

    >>> integer_range(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def per_channel(scale: Tensor, ndim: int) -> Tensor:
    """Shape a (C,) scale so that it broadcasts along axis 0 of an `ndim`-dimensional weight."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return int8 codes of `weight` (C, ...) on grids `scale` (C,), rounded to nearest."""
    low, high = integer_range(bits)
    return torch.round(weight / per_channel(scale, weight.ndim)).clamp(low, high).to(torch.int8)


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight (C, ...) that int8 `codes` on grids `scale` (C,) stand for."""
    return codes * per_channel(scale, codes.ndim)


def fake_quantize(x: Tensor, scale: Tensor, bits: int, shift: Tensor | None = None) -> Tensor:
    """Return `x` quantized and dequantized, in the dtype of `x`.

    Args:
        x: any shape.
        scale: broadcasts against x.
        bits: width of the grid.
        shift: scale * zero, broadcasts against x; None for a symmetric grid.
    """
    low, high = integer_range(bits)
    if shift is None:
        return torch.round(x / scale).clamp(low, high) * scale
    return torch.round((x + shift) / scale).clamp(low, high) * scale - shift


def round_log2(x: Tensor, scale: float, bits: int) -> Tensor:
    """Round `x`, not negative, to the nearest in the logarithm of scale * 2^-code, codes from 0 to 2^bits - 1.

    Args:
        x: any shape; 0 becomes the smallest value.
        scale: the largest value.
        bits: width of the codes.

    >>> round_log2(torch.tensor([1.0, 0.3, 0.2, 0.0]), 1.0, 2).tolist()
    [1.0, 0.25, 0.25, 0.125]
    """
    return scale * torch.exp2(-torch.round(-torch.log2(x / scale)).clamp(0, 2**bits - 1))


def round_straight_through(x: Tensor) -> Tensor:
    """Round to whole numbers, with derivative 1 (the straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def round_float8(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 number, in the dtype of `x`; what lies beyond the largest becomes it."""
    return x.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def search_weight_scale(weight: Tensor, bits: int, norm: float = 2.4, candidates: int = 80) -> Tensor:
    """Find the per-channel scale with the least mean |w - w_hat|^norm.

    The candidates shrink the widest range, max|w| / high, by 1.00, 0.99, ... as TFMQ-DM's "mse" search does.

    Args:
        weight: (C, ...) float.
        bits: width of the grid.
        norm: exponent of the error.
        candidates: how many shrink factors to try.

    Returns:
        (C,) float32, all positive (1 for a channel of zeros).
    """
    flat = weight.detach().flatten(1).float()  # (C, ...) -> (C, K)
    running_max = flat.abs().amax(1) / integer_range(bits)[1]
    running_max = torch.where(running_max > 0, running_max, torch.ones_like(running_max))
    best, best_error = running_max, torch.full_like(running_max, torch.inf)
    for i in range(candidates):
        scale = running_max * (1 - 0.01 * i)
        error = (flat - fake_quantize(flat, scale[:, None], bits)).abs().pow(norm).mean(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best
