"""Look inside a finished calibration: do the sampling steps pull a block's weights the same way, and did omega see it?

Two measurements on one block, with the inputs, the targets and the samples that calibration had. Legend:

    g_s   gradient of the block loss, averaged over the samples of sampling step s, in the dequantized weights
    C     C_st = g_s . g_t / (|g_s| |g_t|), the cosine similarity of two steps (the heat map of GAC, Fig. 1a)
    V     the rounding logits at their start, where the sample scores were updated
    a_i   dl_i/dV . dL/dV, training sample i against the mean of the validation samples L (GAC, Fig. 2)

A few samples a step make a gradient noisy, and noise alone lowers C. So each step's samples are also halved, and the
cosine of the two halves says how much agreement such samples could show at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from calib import affine, gptq
from calib.adaround import LayerWeight
from calib.blocks import Block, BlockIO
from calib.data import NO_CONDITION
from calib.errors import CalibError, did_you_mean
from calib.omega import PerSample
from calib.plan import QuantPlan
from calib.reconstruct import BlockResult, block_loss, layer_weights, of_logits, weight_loss
from calib.trace import trace

CHUNK = 16  # samples differentiated at a time


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Cosine similarity of S gradients, (S, S), and of the two halves of each one's samples, averaged over S.

    `halves` is None where a step has a single sample.
    """

    matrix: Tensor
    halves: float | None

    @property
    def between(self) -> float | None:
        """Mean cosine of two different steps; None if there is one step."""
        count = len(self.matrix)
        total = self.matrix.double().sum() - self.matrix.double().trace()
        return float(total / (count * (count - 1))) if count > 1 else None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Per-step gradients of one block compared, at nearest rounding (`before`) and at the plan's weights (`after`).

    `samples` is the number of samples of each of `steps`; the fewest, where steps differ.
    """

    block: str
    steps: tuple[int, ...]
    samples: int
    before: Cosines
    after: Cosines


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Sample weights and what they should follow: `omega` (N,), summing to 1, and `inner` products a_i (N,)."""

    block: str
    validation: int
    omega: Tensor
    inner: Tensor


def inspectable_blocks(
    model: nn.Module, plan: QuantPlan, shape: tuple[int, ...], timesteps: int, cond: Mapping[str, Tensor] = NO_CONDITION
) -> list[BlockResult]:
    """Return the plan's blocks that can be looked at alone: called once a forward pass, with plain tensors.

    Args:
        model: the float network.
        plan: made from it.
        shape: (C, H, W).
        timesteps: number of training timesteps.
        cond: example conditions, at least one row each.
    """
    calls = trace(model, shape, timesteps, cond).calls
    return [b for b in plan.blocks if b.name in calls and calls[b.name].plain and calls[b.name].count == 1]


def choose_block(candidates: Sequence[BlockResult], name: str | None) -> BlockResult | None:
    """Return the block called `name`; by default the one with the largest loss at nearest rounding, or the first.

    Raises:
        CalibError: no block has that name.
    """
    if name is None:
        return max(candidates, key=lambda b: -1.0 if b.loss_before is None else b.loss_before, default=None)
    by_name = {b.name: b for b in candidates}
    if name not in by_name:
        hint = did_you_mean(name, list(by_name), cutoff=0) if by_name else " This plan has none to inspect alone."
        raise CalibError(f"No block is called {name!r}; {len(by_name)} can be inspected.{hint}")
    return by_name[name]


def agreement(model: nn.Module, plan: QuantPlan, block: BlockResult, io: BlockIO, step: Tensor) -> Agreement:
    """Compare the block's gradients between sampling steps, before and after its rounding was learned.

    Args:
        model: the float network.
        plan: made from it.
        block: one of the plan's.
        io: recording of some samples, with inputs from the weight-quantized network as in calibration; there the blocks
            behind this one are still float, but they do not reach its inputs.
        step: (N,) sampling step of each of them.
    """
    module = model.get_submodule(block.name)
    layers = _layer_weights(module, plan, block)
    steps, counts = torch.unique(step, return_counts=True)
    groups = [(step == s).nonzero()[:, 0] for s in steps]
    nearest = [affine.dequantize_weight(affine.quantize_weight(w.weight, w.scale, w.bits), w.scale) for w in layers]
    codes = [plan.layers[name].codes.to(io.device) for name in block.layers]
    learned = [affine.dequantize_weight(c, w.scale) for c, w in zip(codes, layers, strict=True)]
    return Agreement(
        block=block.name,
        steps=tuple(steps.tolist()),
        samples=int(counts.min()),
        before=_cosines(module, layers, nearest, io, groups),
        after=_cosines(module, layers, learned, io, groups),
    )


def alignment(
    model: nn.Module,
    plan: QuantPlan,
    block: BlockResult,
    train: BlockIO,
    validation: BlockIO,
) -> Alignment:
    """Set each training sample's omega beside the inner product of its gradient with the mean validation gradient.

    Args:
        model: the float network.
        plan: made from it.
        block: one of the plan's.
        train: recording of the N samples that the plan's scores belong to.
        validation: recording of the samples set aside.

    Raises:
        CalibError: the plan has another number of scores.
    """
    if len(plan.scores) != len(train):
        raise CalibError(
            f"The plan weighs {len(plan.scores)} samples, the collected ones are {len(train)}: calibrate again."
        )
    module = model.get_submodule(block.name)
    layers = _layer_weights(module, plan, block)
    logits = [v.requires_grad_() for v in gptq.first_logits(plan.config, block.name, module, layers, train)]
    losses = of_logits(weight_loss(module, layers), layers)
    inner = _inner_products(losses, logits, train, _mean_gradient(losses, logits, validation))
    omega = torch.softmax(plan.scores.double() / plan.config.omega.temperature, 0)
    return Alignment(block=block.name, validation=len(validation), omega=omega, inner=inner.double().cpu())


def cosine_matrix(gradients: Tensor) -> Tensor:
    """Return (S, S) cosine similarities of the rows of (S, P); a row of zeros is at right angles to all others."""
    unit = F.normalize(gradients, dim=1, eps=torch.finfo(gradients.dtype).tiny)
    return (unit @ unit.T).clamp(-1, 1).fill_diagonal_(1)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Return the rank correlation of two (N,) tensors, ties at their mean rank; None if one of them is constant.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -10.0, -100.0]))
    -1.0
    """
    x, y = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    size = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / size if size > 0 else None


def bin_means(key: Tensor, values: Sequence[Tensor], bins: int) -> list[Tensor]:
    """Return the means of each of `values` in bins of equal size (to within one) by `key`.

    Args:
        key: (N,), sorted by.
        values: (N,) each.
        bins: how many, or N if that is fewer.
    """
    order = torch.argsort(key, stable=True)
    return [torch.stack([part.mean() for part in torch.tensor_split(v[order], min(bins, len(key)))]) for v in values]


def _ranks(values: Tensor) -> Tensor:
    _, position, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # the rank of the last of each run of ties, from 1
    ranks: Tensor = (last - (counts - 1) / 2)[position]
    return ranks


def _cosines(
    module: nn.Module, layers: Sequence[LayerWeight], weights: Sequence[Tensor], io: BlockIO, groups: Sequence[Tensor]
) -> Cosines:
    gradients = torch.empty(len(groups), sum(w.numel() for w in weights), device=io.device)
    halved = []
    for row, group in zip(gradients, groups, strict=True):
        halves = torch.stack([_gradient_sum(module, layers, weights, io, h) for h in torch.tensor_split(group, 2)])
        torch.sum(halves, 0, out=row)  # (2, P) -> (P,)
        halved.append(float(cosine_matrix(halves)[0, 1]))
    whole = all(len(group) > 1 for group in groups)
    return Cosines(matrix=cosine_matrix(gradients).cpu(), halves=sum(halved) / len(halved) if whole else None)


def _mean_gradient(losses: PerSample, logits: Sequence[Tensor], io: BlockIO) -> list[Tensor]:
    """Return dL/dV, L the mean loss of all samples in `io`, in the shapes of the logits V."""
    mean = [torch.zeros_like(v) for v in logits]
    for index in _chunks(torch.arange(len(io))):
        parts = torch.autograd.grad(losses(logits, io.take(index)).sum() / len(io), logits)
        mean = [m + p for m, p in zip(mean, parts, strict=True)]
    return mean


def _inner_products(losses: PerSample, logits: Sequence[Tensor], io: BlockIO, direction: Sequence[Tensor]) -> Tensor:
    """Return dl_i/dV . direction (N,) of every sample in `io`.

    No sample needs a backward pass alone: the derivative of (J^T u) . direction in u is J direction.
    """
    inner = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for index in _chunks(torch.arange(len(io))):
            # u (n,); which values it has does not matter
            dual = torch.ones(len(index), device=io.device, requires_grad=True)
            rows = torch.autograd.grad((dual * losses(logits, io.take(index))).sum(), logits, create_graph=True)
            products = torch.stack([(r * d).sum() for r, d in zip(rows, direction, strict=True)]).sum()
            inner.append(torch.autograd.grad(products, dual)[0])
    return torch.cat(inner)


def _gradient_sum(
    module: nn.Module, layers: Sequence[LayerWeight], weights: Sequence[Tensor], io: BlockIO, index: Tensor
) -> Tensor:
    """Return (P,): the gradient of the samples' summed loss in all of the block's weights."""
    point = [w.detach().clone().requires_grad_() for w in weights]
    total = torch.zeros(sum(w.numel() for w in point), device=io.device)
    for part in _chunks(index):
        gradients = torch.autograd.grad(block_loss(module, layers, point, io.take(part)).sum(), point)
        total += torch.cat([g.flatten() for g in gradients])
    return total


def _layer_weights(module: nn.Module, plan: QuantPlan, block: BlockResult) -> list[LayerWeight]:
    scales = {name: plan.layers[name].weight_scale for name in block.layers}
    bits = {name: plan.layers[name].weight_bits for name in block.layers}
    return layer_weights(module, Block(name=block.name, layers=block.layers), scales, bits)


def _chunks(index: Tensor) -> Sequence[Tensor]:
    """Cut (n,) into pieces of at most CHUNK; none if it is empty."""
    return torch.split(index, CHUNK) if len(index) else ()
