"""Corrections of the predicted noise, measured once for every sampling step and applied by the sampler as tables.

A quantized network predicts epsilon + error. What of the error is the same for all images can be taken back:

    epsilon := gain * (epsilon - bias)        before the sampler's update
    x := x - shift                            before the network

PTQD (He et al. 2023, arXiv 2305.10657) splits the error into k * epsilon, a bias of each channel, and a rest, which is
noise: a sampler that adds noise adds that much less. TAC (Yao et al. 2024, arXiv 2407.03917) gives each
channel the factor that brings it closest to the float network's, in absolute and in relative terms, and takes the mean
drift of x back.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from calib.choices import CorrectionRule
from calib.records import Finite, NonNegative

Table = tuple[tuple[Finite, ...], ...]  # (S, C)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """One row a sampling step.

    Attributes:
        rule: the method, a member of `choices.CorrectionRule`.
        gain: (S, C) factor of the predicted noise, once the bias is off.
        bias: (S, C) mean error of the predicted noise.
        shift: (S, C) mean error of x.
        variance: (S,) of the error that is left; an eta or DDPM sampler takes it off the noise that it adds.
        explained: (S,) share of the error that the gain takes away: R^2 of PTQD's regression, or of TAC's square.
    """

    rule: CorrectionRule
    gain: Table
    bias: Table
    shift: Table
    variance: tuple[NonNegative, ...]
    explained: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __post_init__(self) -> None:
        shapes = {(len(table), len(row)) for table in (self.gain, self.bias, self.shift) for row in table}
        steps = {len(self.gain), len(self.bias), len(self.shift), len(self.variance), len(self.explained)}
        if len(shapes) != 1 or len(steps) != 1:
            raise ValueError("a correction with as many steps and channels in each table")


@dataclass(frozen=True, kw_only=True)
class Regression:
    """The error of one step as k * epsilon + bias + rest (PTQD, section 3.3, as its code estimates it).

    Attributes:
        k: slope of the error over epsilon, 0 if it is negative.
        bias: (C,) mean error.
        sigma: standard deviation of error - k * epsilon within an image, averaged over images.
        explained: R^2 of the regression, before a negative slope is dropped.
    """

    k: float
    bias: Tensor
    sigma: float
    explained: float


def regress(epsilon: Tensor, error: Tensor) -> Regression:
    """Fit the error of the predicted noise at one step against the float network's (PTQD, arXiv 2305.10657).

    Args:
        epsilon: (N, C, H, W), the float network's.
        error: (N, C, H, W), the quantized network's minus the float network's.
    """
    epsilon, error = epsilon.double(), error.double()
    x, y = epsilon - epsilon.mean(), error - error.mean()
    slope = float((x * y).sum() / x.square().sum())
    explained = float(1 - (y - slope * x).square().sum() / y.square().sum().clamp(min=1e-300))
    k = max(slope, 0.0)
    rest = error - k * epsilon
    return Regression(
        k=k,
        bias=error.mean((0, 2, 3)),
        sigma=float(rest.flatten(1).std(1).mean()),
        explained=explained,
    )


def channel_gain(
    quantized: Tensor, expected: Tensor, *, relative: float = 0.5, ridge: float = 0.1, floor: float = 1.0
) -> Tensor:
    """Return the factor of each channel (C,) that brings `quantized` closest to `expected`, both (N, C, H, W).

    The mean over images of what minimises, in closed form (TAC, its noise estimation reconstruction),

        (1 - relative) sum (K q - r)^2 + relative M sum ((K q - r) / r)^2 + ridge M (K - 1)^2

    over the values of a channel with |q| > floor * mean |q|, since near 0 a relative error means nothing; M = C H W.

    Args:
        quantized: noise that the quantized network predicts.
        expected: noise that the float network predicts from the same x.
        relative: weight of the relative error, lambda 1.
        ridge: pull towards 1, lambda 2.
        floor: which values count.
    """
    q, r = (value.double().flatten(2) for value in (quantized, expected))  # (N, C, H W)
    size = q[0].numel()
    counts = (q.abs() > floor * q.abs().mean(2, keepdim=True)) & (r != 0)
    q, r = torch.where(counts, q, 0.0), torch.where(counts, r, 1.0)
    ratio = q / r
    top = (1 - relative) * (q * r).sum(2) + size * (relative * ratio.sum(2) + ridge)
    bottom = (1 - relative) * q.square().sum(2) + size * (relative * ratio.square().sum(2) + ridge)
    return (top / bottom).mean(0)
