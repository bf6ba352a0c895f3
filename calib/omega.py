"""Sample weights omega: which calibration samples pull a block's rounding the same way at every sampling step.

GAC (arXiv 2602.01289, Algorithms 1 and 2) gives each training sample a score s_i and weights a mini-batch by
omega = softmax(s / tau). The scores of a block are learned before its rounding is, by one-step-ahead
meta-optimisation: after the inner update V* = V - eta J^T omega the validation loss should be low, and its gradients
with respect to omega should agree between the groups of sampling steps (the paper's surrogate, eq. for L_GM^(2)).

Because V* is affine in omega the outer gradient has a closed form without third derivatives. Legend:

    l_i(V)   loss of training sample i            J      rows dl_i/dV             n samples x P logits
    L_k(V*)  loss of validation group k           g_k    dL_k/dV*                 H_k = d2L_k/dV*2
    G_k      dL_k/domega = -eta J g_k             S_G    sum_k G_k                c = 2 / (K (K - 1))

    d/domega [ mean_k L_k - c sum_{t<k} G_t . G_k ] = S_G / K - c eta^2 J sum_k H_k J^T (S_G - G_k)

J v and J^T u are reverse-mode products, H_k v a Hessian-vector product. eta is chosen at each step so that the
root-mean-square change of V is `inner_step`: the paper gives no eta, and a relative step does not depend on the
scale of a block's output.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calib.blocks import BlockIO
from calib.config import OmegaConfig


class PerSample(Protocol):
    """The loss of each of some samples as a function of a block's rounding logits."""

    def __call__(self, logits: Sequence[Tensor], io: BlockIO, index: Tensor) -> Tensor:
        """Return (m,) losses of the samples of `io` at `index` (m,)."""


def initial_scores(samples: int, batch: int) -> Tensor:
    """Return equal scores 1/batch, (samples,) float64: the paper's start, uniform weights."""
    return torch.full((samples,), 1 / batch, dtype=torch.float64)


def batch_weights(scores: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Return softmax(s / tau) over the mini-batch `index` (n,); sums to 1."""
    return torch.softmax(scores[index] / temperature, 0).float()


def softmax_gradient(omega: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Carry a gradient with respect to omega back to the scores: omega_i (g_i - omega . g) / tau."""
    return omega * (gradient - (omega * gradient).sum()) / temperature


def align(
    loss: PerSample,
    logits: Sequence[Tensor],
    train: BlockIO,
    validation: BlockIO,
    group: Tensor,
    scores: Tensor,
    config: OmegaConfig,
    generator: torch.Generator,
) -> Tensor:
    """Return the scores (N,) after this block's meta-updates (Algorithm 2).

    Args:
        loss: per-sample block loss.
        logits: rounding logits of the block, at their start.
        train: recording of the N training samples.
        validation: recording of the validation samples.
        group: (len(validation),) task group of each validation sample.
        scores: (N,) scores carried over from the block before.
        config: how many steps, how large.
        generator: draws the mini-batches.
    """
    scores = scores.clone()
    optimiser = torch.optim.SparseAdam([scores], lr=config.meta_learning_rate)
    members = [(group == k).nonzero()[:, 0] for k in torch.unique(group)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for _ in range(config.meta_steps):
            index = torch.randperm(len(train), generator=generator)[: config.batch]
            tasks = [m[torch.randperm(len(m), generator=generator)[: config.validation_batch]] for m in members]
            omega = batch_weights(scores, index, config.temperature)
            gradient = surrogate_gradient(
                partial(loss, io=train, index=index),
                [_mean(partial(loss, io=validation, index=task)) for task in tasks],
                logits,
                omega,
                config.inner_step,
            )
            step = softmax_gradient(omega, gradient, config.temperature).to(scores.dtype)
            scores.grad = torch.sparse_coo_tensor(index[None], step, scores.shape, check_invariants=False)
            optimiser.step()  # type: ignore[no-untyped-call]
    return scores.detach()


def surrogate_gradient(
    samples: Callable[[Sequence[Tensor]], Tensor],
    tasks: Sequence[Callable[[Sequence[Tensor]], Tensor]],
    logits: Sequence[Tensor],
    omega: Tensor,
    inner_step: float,
) -> Tensor:
    """Return the gradient of mean_k L_k + L_GM^(2) with respect to omega, (n,), by the closed form above.

    Args:
        samples: logits -> losses (n,) of the training mini-batch.
        tasks: one per group, logits -> scalar loss.
        logits: the block's rounding logits V.
        omega: (n,) sample weights.
        inner_step: root-mean-square of V* - V; it fixes eta.
    """
    point = [v.detach().requires_grad_() for v in logits]
    dual = omega.detach().clone().requires_grad_()
    losses = samples(point)
    weighted = torch.autograd.grad((dual * losses).sum(), point, create_graph=True)  # J^T omega, as a function of omega

    def times_j(v: Sequence[Tensor]) -> Tensor:
        return torch.autograd.grad(_dot(weighted, v), dual, retain_graph=True)[0]

    def times_jt(u: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((u * losses).sum(), point, retain_graph=True)

    size = _rms(weighted)
    if size == 0:  # the samples cancel: the inner update goes nowhere, whatever eta is
        return torch.zeros_like(omega)
    eta = inner_step / size
    ahead = [(v - eta * w).detach().requires_grad_() for v, w in zip(point, weighted, strict=True)]
    g = [torch.autograd.grad(task(ahead), ahead, create_graph=True) for task in tasks]
    big_g = [-eta * times_j([x.detach() for x in g_k]) for g_k in g]
    total = torch.stack(big_g).sum(0)
    mean_loss = total / len(tasks)
    if len(tasks) < 2:
        return mean_loss
    inner = [torch.zeros_like(v) for v in point]
    for g_k, big_g_k in zip(g, big_g, strict=True):
        hvp = torch.autograd.grad(_dot(g_k, times_jt(total - big_g_k)), ahead)
        inner = [a + b for a, b in zip(inner, hvp, strict=True)]
    c = 2 / (len(tasks) * (len(tasks) - 1))
    return mean_loss - c * eta**2 * times_j(inner)


def _mean(losses: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda logits: losses(logits).mean()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _rms(tensors: Sequence[Tensor]) -> float:
    count = sum(v.numel() for v in tensors)
    total = sum(float(v.detach().double().square().sum()) for v in tensors)
    return math.sqrt(total / count)
