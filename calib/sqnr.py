"""Signal to quantization-noise ratio in decibels: 10 log10(|exact|^2 / |exact - quantized|^2).

Both functions are that formula, of tensors or of two powers that were summed elsewhere. They stay apart because torch's
logarithm and Python's differ in the last bit, and plans hold numbers of the second kind.
"""

import math

import torch
from torch import Tensor

EQUAL_DB = 200.0  # of two tensors that are equal, since JSON has no infinity
TINY = 1e-300  # stands for a noise power of zero


def sqnr_db(exact: Tensor, quantized: Tensor) -> float:
    """Return the SQNR of a tensor in dB, at most EQUAL_DB.

    >>> round(sqnr_db(torch.ones(4), torch.full((4,), 0.9)), 3)
    20.0

    Args:
        exact: any shape; its power is the signal.
        quantized: the same shape; the power of its difference to `exact` is the noise.
    """
    # float64, because the squares of many small differences would get lost in a float32 sum.
    signal, noise = exact.double().square().sum(), (exact.double() - quantized.double()).square().sum()
    return float((10 * torch.log10(signal / noise.clamp(min=TINY))).clamp(max=EQUAL_DB))


def ratio_db(signal: float, noise: float) -> float:
    """Return the ratio of two powers in dB.

    >>> ratio_db(100.0, 1.0)
    20.0

    Args:
        signal: greater than 0.
        noise: 0 or more, in the unit of `signal`.
    """
    return 10 * math.log10(signal / max(noise, TINY))
