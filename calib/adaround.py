"""AdaRound (Nagel et al. 2020): each weight learns whether to round up or down.

Legend: W weight, Delta its scale, V rounding logits, h(V) soft rounding in [0, 1], beta annealed sharpness.

    W_hat = Delta * clamp(floor(W / Delta) + h(V), low, high),   h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
"""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A float weight (C, ...), its scale (C,) and bits; `key` names it inside the block, e.g. "conv1.weight"."""

    key: str
    weight: Tensor
    scale: Tensor
    bits: int


class LearnedRounding:
    """The rounding of one weight while it is learned: V, W_hat, and the way of a gradient from W_hat back to V.

    It computes what autograd would of `soft_weight` and `regulariser`, to the bit, but h(V) once and not three times,
    and in memory that is used again: for small images these passes over the weight are most of an iteration.

    Args:
        layer: the weight and its grid.
        logits: V (C, ...) to start from.
    """

    def __init__(self, layer: LayerWeight, logits: Tensor) -> None:
        low, high = integer_range(layer.bits)
        self._range = low, high
        self._step = per_channel(layer.scale, layer.weight.ndim)
        self._floor = torch.floor(layer.weight / self._step)
        # dW_hat / dh: a code at the end of the grid stays there whatever h is.
        self._slope = self._step * ((self._floor >= low) & (self._floor < high))
        self.logits = logits.detach().clone()
        self.logits.grad = torch.zeros_like(self.logits)
        self._sigmoid, self._stretched, self._soft, self._pull = (torch.empty_like(self.logits) for _ in range(4))
        self._free = torch.empty_like(self.logits, dtype=torch.bool)
        self._weight = torch.empty_like(self.logits)
        self.update()

    @property
    def weight(self) -> Tensor:
        """W_hat (C, ...), a leaf that takes gradients."""
        return self._weight.detach().requires_grad_()

    @torch.no_grad()
    def update(self) -> None:
        """Work out W_hat for the logits as they are now."""
        low, high = self._range
        torch.sigmoid(self.logits, out=self._sigmoid)
        torch.mul(self._sigmoid, ZETA - GAMMA, out=self._stretched)
        self._stretched.add_(GAMMA)
        torch.clamp(self._stretched, 0, 1, out=self._soft)
        torch.eq(self._soft, self._stretched, out=self._free)  # where V moves h(V)
        torch.add(self._floor, self._soft, out=self._weight)
        self._weight.clamp_(low, high).mul_(self._step)

    @torch.no_grad()
    def backward(self, gradient: Tensor, strength: float | Tensor, sharpness: float | Tensor | None) -> None:
        """Set the gradient of the logits.

        Args:
            gradient: of the loss in W_hat; overwritten.
            strength: lambda of the regulariser.
            sharpness: its beta; None leaves it out.
        """
        assert self.logits.grad is not None
        gradient.mul_(self._slope)
        self._through_soft(gradient, ZETA - GAMMA, out=self.logits.grad)
        if sharpness is None:
            return
        # d/dh of lambda (1 - |d|^beta), d = 2h - 1: -lambda beta |d|^(beta - 1) sign(d) 2. The factor 2 comes last.
        torch.mul(self._soft, 2, out=gradient)
        gradient.sub_(1)
        torch.abs(gradient, out=self._pull)
        self._pull.pow_(sharpness - 1).mul_(sharpness).mul_(-strength)
        self._pull.mul_(gradient.sign_())
        self._through_soft(self._pull, 2 * (ZETA - GAMMA), out=self._pull)
        self.logits.grad.add_(self._pull)

    def _through_soft(self, gradient: Tensor, factor: float, out: Tensor) -> None:
        """Turn a gradient in h, times `factor`, into one in V; `gradient` is overwritten."""
        gradient.mul_(self._free).mul_(factor)
        torch.ops.aten.sigmoid_backward.grad_input(gradient, self._sigmoid, grad_input=out)
