"""Sample weights omega: which calibration samples pull a block's rounding the same way at every sampling step.

GAC (arXiv 2602.01289, Algorithms 1 and 2) gives each training sample a score s_i and weights a mini-batch by
omega = softmax(s / tau). The scores are updated once a block, before its rounding is learned, by one-step-ahead
meta-optimisation: after the inner update V* = V - eta J^T omega the validation loss should be low, and its gradients
should agree between the groups of sampling steps. Legend:

    l_i(V)   loss of training sample i            J      rows dl_i/dV             n samples x P logits
    L_k(V*)  loss of validation group k           g_k    dL_k/dV*                 H_k = d2L_k/dV*2
    G_k      dL_k/domega = -eta J g_k             S, S_G sum_k g_k, sum_k G_k     c = 2 / (K (K - 1))

V* is affine in omega, so every rung of the ladder has a closed form without third derivatives:

    mse        d/domega mean_k L_k                                  = S_G / K            (Ren et al. 2018)
    gac        ... - c sum_{t<k} G_t . G_k, the paper's surrogate:    S_G / K - c eta^2 J sum_k H_k J^T (S_G - G_k)
    gac-exact  ... - c sum_{t<k} g_t . g_k:                           S_G / K + c eta J sum_k H_k (S - g_k)
    fish       dL_k/domega along a path that steps down one group after the other (Shi et al. 2021): to first order
               it descends the surrogate, with no second derivative

V rests at its start during a block's meta-updates, so J is computed once a block, for one mini-batch drawn for it;
a meta-step then costs the K validation gradients and one product with the Hessians. eta is `inner_step` over the root
mean square of J: the paper gives no eta, and this one depends neither on the scale of a block's output nor on whether
the samples of a mini-batch happen to cancel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from calib.blocks import BlockIO
from calib.choices import OmegaRule, SoftmaxOver
from calib.config import OmegaConfig
from calib.devices import HOST

CHUNK = 8  # samples whose gradients are held at once while J is computed
ON_DEVICE = 1 << 30  # bytes of J up to which it lies on a GPU; a larger one lies on the host

Loss = Callable[[Tensor], Tensor]  # logits (P,) -> scalar


class PerSample(Protocol):
    """The loss of each sample of a recording as a function of a block's rounding logits."""

    def __call__(self, logits: Sequence[Tensor], io: BlockIO) -> Tensor:
        """Return (len(io),) losses."""


def initial_scores(config: OmegaConfig, samples: int, generator: torch.Generator) -> Tensor:
    """Return the scores (samples,) float64 that calibration starts from.

    Equal scores 1/batch, the paper's start, give uniform weights; rule "random" draws them from a standard normal.

    Args:
        config: rule and mini-batch.
        samples: N.
        generator: draws random scores.
    """
    if config.rule is OmegaRule.RANDOM:
        return torch.randn(samples, generator=generator, dtype=torch.float64)
    return torch.full((samples,), 1 / config.batch, dtype=torch.float64)


def weighting(scores: Tensor, config: OmegaConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from a mini-batch, the indices (n,) of its samples, to their weights (n,) float32.

    With `softmax` "batch" they are softmax(s / tau) over the mini-batch and sum to 1; with "set" the softmax runs over
    all N samples, times N / n, so that a mini-batch of heavy samples moves the rounding more than one of light ones.

    Args:
        scores: s (N,) float64.
        config: softmax and temperature tau.
    """
    if config.softmax is SoftmaxOver.SET:
        shares = torch.softmax(scores / config.temperature, 0)  # once, and not for each mini-batch
        return lambda index: (shares[index] * (len(scores) / len(index))).float()
    return lambda index: torch.softmax(scores[index] / config.temperature, 0).float()


def score_gradient(omega: Tensor, gradient: Tensor, config: OmegaConfig, samples: int) -> Tensor:
    """Return dL/ds (n,) of the scores of a mini-batch, through the softmax of `weighting`.

    Args:
        omega: (n,) sample weights.
        gradient: dL/domega (n,).
        config: softmax and temperature tau.
        samples: N.
    """
    # d omega_i / d s_j = omega_i (1[i = j] - p_j) / tau, where p_j is omega_j, or n / N of it over the set.
    share = len(omega) / samples if config.softmax is SoftmaxOver.SET else 1.0
    return omega * (gradient - share * (omega * gradient).sum()) / config.temperature


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """What one block's scores are updated on.

    Attributes:
        train: recording of the N training samples.
        validation: recording of the samples set aside.
        group: (len(validation),) int64, the group of sampling steps, or task, of each validation sample.
    """

    train: BlockIO
    validation: BlockIO
    group: Tensor


def align_scores(
    loss: PerSample,
    logits: Sequence[Tensor],
    data: Recordings,
    scores: Tensor,
    config: OmegaConfig,
    generator: torch.Generator,
) -> Tensor:
    """Return the scores (N,) after this block's meta-updates (GAC, Algorithm 2); unchanged if the rule has none.

    Args:
        loss: the block's loss of each sample.
        logits: rounding logits of the block, at their start.
        data: training and validation samples.
        scores: (N,) float64, carried over from the block before.
        config: rule, how many steps, how large.
        generator: draws the mini-batches.
    """
    if config.rule not in RULES:
        return scores
    point, losses = _flattened(loss, logits)
    index = _draw(torch.arange(len(data.train)), config.batch, generator)  # (n,)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        attention = _attention_bytes(losses, point, data.train.take(index[:1]))
        jacobian = _jacobian(losses, point, data.train.take(index), attention)
        size = _root_mean_square(jacobian)
        if size == 0:  # every loss is flat here, so no weights are better than others
            return scores

        def gradient(omega: Tensor) -> Tensor:
            """Return dL/domega (n,), on fresh validation samples of each group, the groups in random order."""
            # The order matters to `fish` alone, but all rules draw it, so that they draw the same samples.
            members = [(data.group == k).nonzero()[:, 0] for k in torch.unique(data.group)]
            order = torch.randperm(len(members), generator=generator).tolist()
            drawn = [_draw(members[k], config.validation_batch, generator) for k in order]
            parts = [data.validation.take(task) for task in drawn]
            largest = 0 if point.device == HOST else max(attention, 4 * len(point))
            apart = largest * sum(map(len, parts)) > ON_DEVICE
            tasks: list[Loss] = [Apart(losses, part) if apart else _mean(losses, part) for part in parts]
            return RULES[config.rule](jacobian, config.inner_step / size, point, tasks, omega.to(point.device))

        return _descend(gradient, scores, index, config)


def _flattened(loss: PerSample, logits: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor, BlockIO], Tensor]]:
    """Return all logits as one point V (P,), and the losses (n,) of samples as a function of such a point."""
    sizes = [v.numel() for v in logits]
    shapes = [v.shape for v in logits]

    def losses(point: Tensor, io: BlockIO) -> Tensor:
        return loss([v.reshape(s) for v, s in zip(torch.split(point, sizes), shapes, strict=True)], io)

    return torch.cat([v.detach().flatten() for v in logits]), losses


def _descend(gradient: Callable[[Tensor], Tensor], scores: Tensor, index: Tensor, config: OmegaConfig) -> Tensor:
    """Return the scores (N,) after Adam has moved those at `index` (n,) against the `gradient` in their weights."""
    moving = scores[index].clone().requires_grad_()
    optimiser = torch.optim.Adam([moving], lr=config.meta_learning_rate)
    for _ in range(config.meta_steps):
        # All N scores, since with the softmax over the set those outside the mini-batch count as well.
        omega = weighting(scores.index_copy(0, index, moving.detach()), config)(index)
        # Scores and weights are a few numbers on the host; what their gradient comes from is on the device.
        moving.grad = score_gradient(omega, gradient(omega).cpu(), config, len(scores)).to(moving.dtype)
        optimiser.step()
    return scores.index_copy(0, index, moving.detach())


def mse(jacobian: Tensor, eta: float, point: Tensor, tasks: Sequence[Loss], omega: Tensor) -> Tensor:
    """Return d/domega of mean_k L_k(V*).

    Args:
        jacobian: J (n, P).
        eta: inner step.
        point: V (P,).
        tasks: one per group, logits (P,) -> scalar loss.
        omega: (n,) sample weights.
    """
    g = _gradients(tasks)(point - eta * _combined(omega, jacobian))  # (K, P), at V* = V - eta J^T omega
    return -eta / len(tasks) * _along(jacobian, g.sum(0))


def surrogate(jacobian: Tensor, eta: float, point: Tensor, tasks: Sequence[Loss], omega: Tensor) -> Tensor:
    """Return d/domega of mean_k L_k + L_GM^(2), gradients matched with respect to omega; arguments as `mse`."""
    g, times_h = _gradients_and_hessians(tasks, point - eta * _combined(omega, jacobian))
    big_g = -eta * (g.to(jacobian.device) @ jacobian.T).to(g.device)  # (K, P) x (P, n) -> (K, n)
    total = big_g.sum(0)
    pull = times_h(_combined(total - big_g, jacobian))  # (K, n) x (n, P) -> (K, P) -> (P,)
    return total / len(tasks) - _pairs(len(tasks)) * eta**2 * _along(jacobian, pull)


def exact(jacobian: Tensor, eta: float, point: Tensor, tasks: Sequence[Loss], omega: Tensor) -> Tensor:
    """Return d/domega of mean_k L_k + L_GM, gradients matched with respect to V*; arguments as `mse`."""
    g, times_h = _gradients_and_hessians(tasks, point - eta * _combined(omega, jacobian))
    total = g.sum(0)  # S (P,)
    pull = times_h(total - g)  # of all pairs at once: group k is matched with the sum of the others
    return eta * _along(jacobian, _pairs(len(tasks)) * pull - total / len(tasks))


def fish(jacobian: Tensor, eta: float, point: Tensor, tasks: Sequence[Loss], omega: Tensor) -> Tensor:
    """Return the mean of dL_k/domega along a path that takes one step down each group in turn; arguments as `mse`.

    The order of the tasks is random at each meta-step. One step moves the weights by FISH_STEP of their mean, root mean
    square.
    """
    total = torch.zeros_like(omega)
    for task in tasks:
        gradient = mse(jacobian, eta, point, [task], omega)
        size = gradient.square().mean().sqrt()
        # Divided by its size, so that a step is as long whatever the scale of the losses.
        omega = omega - FISH_STEP * omega.mean() * gradient / size.clamp(min=1e-30)
        total = total + gradient
    return total / len(tasks)


FISH_STEP = 0.1
RULES = {OmegaRule.MSE: mse, OmegaRule.GAC: surrogate, OmegaRule.GAC_EXACT: exact, OmegaRule.FISH: fish}


def _draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return pool[torch.randperm(len(pool), generator=generator)[:count]]


class Apart:
    """The mean loss of some samples whose derivatives are worked out one after another: at once they take too much.

    Args:
        losses: of samples, as a function of the logits.
        io: the samples, in memory.
    """

    def __init__(self, losses: Callable[[Tensor, BlockIO], Tensor], io: BlockIO) -> None:
        self._losses = [_mean(losses, io.take(index)) for index in torch.split(torch.arange(len(io)), 1)]

    def __call__(self, p: Tensor) -> Tensor:
        """Return the loss () of logits (P,)."""
        return torch.stack([loss(p) for loss in self._losses]).mean()

    def gradient(self, p: Tensor) -> Tensor:
        """Return that of the loss (P,)."""
        return sum((grad(loss)(p) for loss in self._losses), torch.zeros_like(p)) / len(self._losses)

    def times_hessian(self, p: Tensor, u: Tensor) -> Tensor:
        """Return H u (P,)."""
        total = torch.zeros_like(p)
        for loss in self._losses:
            total += vjp(grad(loss), p)[1](u)[0]
        return total / len(self._losses)


def _gradients(tasks: Sequence[Loss]) -> Callable[[Tensor], Tensor]:
    return lambda p: torch.stack([task.gradient(p) if isinstance(task, Apart) else grad(task)(p) for task in tasks])


def _gradients_and_hessians(tasks: Sequence[Loss], p: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return g (K, P), and the function from u (K, P) to sum_k H_k u_k (P,).

    The pullback of g gives sum_k H_k^T u_k, and a Hessian is symmetric.
    """
    apart = [task for task in tasks if isinstance(task, Apart)]  # all of them, or none
    if apart:
        return _gradients(tasks)(p), lambda u: _sum_of_products(apart, p, u)
    g, pullback, *_ = vjp(_gradients(tasks), p)
    return g, lambda u: pullback(u)[0]


def _sum_of_products(tasks: Sequence[Apart], p: Tensor, u: Tensor) -> Tensor:
    total = torch.zeros_like(p)
    for task, row in zip(tasks, u, strict=True):
        total += task.times_hessian(p, row)
    return total


def _pairs(groups: int) -> float:
    return 2 / (groups * (groups - 1)) if groups > 1 else 0.0


def _mean(losses: Callable[[Tensor, BlockIO], Tensor], io: BlockIO) -> Loss:
    return lambda p: losses(p, io).mean()


def _combined(weights: Tensor, jacobian: Tensor) -> Tensor:
    """Return weights (..., n) times J (n, P), where the weights are; J may lie on the host."""
    return (weights.to(jacobian.device) @ jacobian).to(weights.device)


def _along(jacobian: Tensor, direction: Tensor) -> Tensor:
    """Return J (n, P) times a direction (P,), where the direction is."""
    return (jacobian @ direction.to(jacobian.device)).to(direction.device)


def _root_mean_square(jacobian: Tensor) -> float:
    """Return that of J (n, P), in double, since squares of small gradients underflow."""
    if 4 * jacobian.numel() <= ON_DEVICE:
        return jacobian.double().square().mean().sqrt().item()
    # Row by row: a copy of all of it in double would be the largest tensor of the calibration.
    squares = [row.double().square().mean() for row in jacobian]
    return torch.stack(squares).mean().sqrt().item()


class _Attention(TorchFunctionMode):
    """Sees how large the largest matrix of attention probabilities is, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: int = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and note its size if it is attention."""
        if func is F.scaled_dot_product_attention:
            query_key: tuple[Tensor, Tensor] = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            q, k = query_key
            self.largest = max(self.largest, 4 * math.prod(q.shape[:-1]) * k.shape[-2])
        return func(*args, **(kwargs or {}))


def _attention_bytes(losses: Callable[[Tensor, BlockIO], Tensor], point: Tensor, io: BlockIO) -> int:
    """Return the bytes of one sample's attention probabilities, 0 on the host, where memory is not as scarce."""
    if point.device == HOST:
        return 0
    seen = _Attention()
    with torch.no_grad(), seen:
        losses(point, io)
    return seen.largest


def _jacobian(losses: Callable[[Tensor, BlockIO], Tensor], point: Tensor, io: BlockIO, attention: int = 0) -> Tensor:
    """Return J (n, P), row i the gradient of sample i's loss; `attention` is what `_attention_bytes` found."""

    def one(p: Tensor, inputs: tuple[object, ...], target: Tensor) -> Tensor:
        return losses(p, io.single(inputs, target))[0]

    axes = tuple(0 if b else None for b in io.batched)  # leaves that all samples share are not mapped over
    over_samples = vmap(grad(one), in_dims=(None, axes, 0))  # one gradient a sample, at once
    # In chunks, since each gradient needs the memory of a backward pass.
    chunk = max(1, min(CHUNK, ON_DEVICE // max(4 * len(point), attention)))
    large = 4 * len(io) * len(point) > ON_DEVICE
    rows = torch.empty(len(io), len(point), device=HOST if large else point.device)
    for index in torch.split(torch.arange(len(io)), chunk):
        part = io.take(index)
        rows[index[0] : index[-1] + 1] = over_samples(point, part.inputs, part.target)  # type: ignore[arg-type]
    return rows
