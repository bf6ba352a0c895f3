"""AdaRound (Nagel et al. 2020): each weight learns whether to round up or down.

Legend: W weight, Delta its scale, V rounding logits, h(V) soft rounding in [0, 1], beta annealed sharpness.

    W_hat = Delta * clamp(floor(W / Delta) + h(V), low, high),   h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
"""

import math

import torch
from torch import Tensor

from calib.affine import integer_range, per_channel

# The sigmoid is stretched beyond [0, 1] and cut off, so that h(V) gets to 0 and 1 at finite V.
GAMMA, ZETA = -0.1, 1.1


def soft_rounding(logits: Tensor) -> Tensor:
    """Return h(V), elementwise in [0, 1]."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """Return V for which the soft weight equals the float weight: h(V) = W / Delta - floor(W / Delta).

    Args:
        weight: W (C, ...).
        scale: Delta (C,).
    """
    grid = weight / per_channel(scale, weight.ndim)  # (C,) -> (C, 1, ...)
    return logits_of(grid - torch.floor(grid))


def logits_of(soft: Tensor) -> Tensor:
    """Return V with h(V) = `soft`, elementwise in [0, 1]."""
    # soft lies strictly between GAMMA and ZETA, so the logarithm is finite at 0 and 1 too.
    return -torch.log((ZETA - GAMMA) / (soft - GAMMA) - 1)


def soft_weight(weight: Tensor, scale: Tensor, logits: Tensor, bits: int) -> Tensor:
    """Return W_hat (C, ...) with soft rounding, differentiable in `logits`.

    Args:
        weight: W (C, ...).
        scale: Delta (C,).
        logits: V (C, ...).
        bits: width of the codes.
    """
    low, high = integer_range(bits)
    step = per_channel(scale, weight.ndim)
    # floor has no gradient, and needs none: it is that of the float weight, which does not change.
    return (torch.floor(weight / step) + soft_rounding(logits)).clamp(low, high) * step


def hard_codes(weight: Tensor, scale: Tensor, logits: Tensor, bits: int) -> Tensor:
    """Return the int8 codes after the final decision: up where V >= 0, that is h(V) >= 1/2, else down.

    Args:
        weight: W (C, ...).
        scale: Delta (C,).
        logits: V (C, ...).
        bits: width of the codes.
    """
    low, high = integer_range(bits)
    floor = torch.floor(weight / per_channel(scale, weight.ndim))
    return (floor + (logits >= 0)).clamp(low, high).to(torch.int8)


def beta(iteration: int, iterations: int, warmup: float, start: float, end: float) -> float | None:
    """Return beta at `iteration`: None (no regulariser) in the warm-up, then linear from `start` to `end`.

    Args:
        iteration: from 0.
        iterations: how many there are.
        warmup: share of them without regulariser.
        start: beta after the warm-up.
        end: beta at the last iteration.

    >>> beta(10, 100, 0.2, 20.0, 2.0) is None
    True
    >>> beta(60, 100, 0.2, 20.0, 2.0)
    11.0
    """
    first = math.ceil(warmup * iterations)
    if iteration < first:
        return None
    return end + (start - end) * max(0.0, 1 - (iteration - first) / (iterations - first))


def regulariser(logits: Tensor, sharpness: float) -> Tensor:
    """Return sum(1 - |2 h(V) - 1|^beta) (), 0 only where every rounding is decided.

    Args:
        logits: V, any shape.
        sharpness: beta.
    """
    # 2h - 1 is -1 or 1 where a rounding is decided; a large beta pulls only at those that nearly are.
    return (1 - (2 * soft_rounding(logits) - 1).abs().pow(sharpness)).sum()
