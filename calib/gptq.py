"""A rounding to start from: GPTQ (Frantar et al. 2022, arXiv 2210.17323), layer by layer inside a block.

AdaRound starts from the float weight and finds the rounding by gradient alone. GPTQ rounds the columns of a weight one
after another and lets those not yet rounded make up for the error, in closed form from the second moments of the
layer's input. Started between the two, AdaRound gets further in few iterations where there are convolutions, and no
further in attention (docs/results/schedules-ddpm-mnist.md).

    min || (W - Q) X ||^2:   H = X X^T,  U = chol(H^-1)^T;   e_i = (w_i - q_i) / U_ii,   W_j -= e_i U_ij  for j > i
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib import adaround
from calib.adaround import LayerWeight
from calib.affine import dequantize_weight, integer_range, per_channel
from calib.blocks import BlockIO
from calib.choices import RoundingStart
from calib.config import QuantConfig
from calib.devices import HOST
from calib.seeds import generator_for

SAMPLES = 64  # of a recording, for the second moments
ON_DEVICE = 1 << 30  # bytes of a layer's unfolded input, or of second moments to factorise, that a GPU has to hold
CHUNK = 8  # samples at once while they are summed
COLUMNS = 128  # rounded before the rest of the weight is brought up to date
DAMPING = 0.01  # of H's mean diagonal
BLEND = 0.7  # how far h(V) starts on the way from the float weight to GPTQ's decision


def first_logits(
    config: QuantConfig, name: str, block: nn.Module, layers: Sequence[LayerWeight], io: BlockIO
) -> list[Tensor]:
    """Return the rounding logits that a block starts from, by the config's rule and seed.

    Args:
        config: rule and seed.
        name: of the block.
        block: its module.
        layers: float weights and grids.
        io: recording of the block's inputs.

    Returns:
        V of each layer, the shape of its weight.
    """
    return STARTS[config.reconstruction.start](block, layers, io, generator_for(config.seed, name, "start"))


def gptq_logits(
    block: nn.Module, layers: Sequence[LayerWeight], io: BlockIO, generator: torch.Generator
) -> list[Tensor]:
    """Return rounding logits that lean towards GPTQ's decision, in the order of `layers`, which is call order.

    A layer's input is that behind the layers before it, already rounded. A layer whose input does not show or does not
    unfold (grouped, or padded other than with zeros) starts from its float weight.

    Args:
        block: holds `layers`; not changed.
        layers: float weights and grids.
        io: recording of the block's inputs.
        generator: draws the samples.

    Returns:
        V of each layer, the shape of its weight.
    """
    # Few samples will do: each gives a convolution one row a pixel.
    few = io.take(torch.randperm(len(io), generator=generator)[:SAMPLES])
    weights = {w.key: w.weight for w in layers}
    logits = []
    for w in layers:
        moments = _second_moments(block, weights, w.key, few)
        if moments is None:
            logits.append(adaround.initial_logits(w.weight, w.scale))
            continue
        codes = round_columns(w.weight.flatten(1), moments, w.scale, w.bits).reshape(w.weight.shape)
        weights[w.key] = dequantize_weight(codes, w.scale)  # the layers behind it see its rounding
        logits.append(_leaning(w, codes))
    return logits


def round_columns(weight: Tensor, moments: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return int8 codes (C, K) of `weight` (C, K) that minimise the error on inputs with second moments (K, K).

    Args:
        weight: float, one output channel a row.
        moments: X X^T, symmetric, on any scale.
        scale: (C,) grid of each row.
        bits: its width.
    """
    low, high = integer_range(bits)
    device = moments.device if 8 * moments.numel() <= ON_DEVICE else HOST
    step, weight = scale.double().to(device), weight.to(device)
    h = moments.to(device, torch.float64, copy=True)  # float32 loses the small eigenvalues that the inverse is made of
    # Damping bounds the condition number; the clamp is for a weight whose inputs are all 0.
    h.diagonal().add_(DAMPING * h.diagonal().mean()).clamp_(min=1e-12)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)  # what matters most is rounded first
    rest = weight.double()[:, order]  # (C, K), what each weight should be by now
    h = h[order[:, None], order]
    h = torch.linalg.cholesky(h)  # one after another: 2 560 channels of 3x3 are 4.2 GB, each time
    h = torch.cholesky_inverse(h)
    u = torch.linalg.cholesky(h, upper=True)  # row i: how column i's error is shared among the columns behind it
    codes = torch.empty_like(rest)
    for first in range(0, rest.shape[1], COLUMNS):
        last = min(first + COLUMNS, rest.shape[1])
        errors = rest.new_empty(len(rest), last - first)  # e_i (C,) side by side
        for i in range(first, last):
            codes[:, i] = torch.round(rest[:, i] / step).clamp(low, high)
            errors[:, i - first] = (rest[:, i] - codes[:, i] * step) / u[i, i]
            # Only the group at hand: the columns behind it are brought up to date at once, by one matrix product.
            rest[:, i:last] -= errors[:, i - first, None] * u[i, i:last]
        rest[:, last:] -= errors @ u[first:last, last:]
    return codes[:, torch.argsort(order)].to(moments.device, torch.int8)


def _leaning(w: LayerWeight, codes: Tensor) -> Tensor:
    """Return V with h(V) BLEND of the way from the float weight to `codes`, or to the neighbour on their side."""
    grid = w.weight / per_channel(w.scale, w.weight.ndim)
    floor = torch.floor(grid)
    up = (codes - floor).clamp(0, 1)  # GPTQ may go further than to the neighbours, AdaRound does not
    h = torch.lerp(grid - floor, up, BLEND).clamp(1e-3, 1 - 1e-3)  # beyond 0 and 1 h(V) is flat
    return adaround.logits_of(h)


def _second_moments(block: nn.Module, weights: Mapping[str, Tensor], key: str, io: BlockIO) -> Tensor | None:
    """Return X X^T (K, K) of what layer `key` sees when the block has `weights`; None if it cannot be seen."""
    layer = block.get_submodule(key.rpartition(".")[0])
    total: Tensor | None = None

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        for x in torch.split(args[0], _at_once(module, args[0])):
            columns = _columns(module, x)
            if columns is not None:
                product = columns.T @ columns
                total = product if total is None else total.add_(product)  # summed over the calls of a pass as well

    with torch.no_grad(), layer.register_forward_pre_hook(hook):
        for index in torch.split(torch.arange(len(io)), CHUNK):
            args, kwargs = io.take(index).call()
            torch.func.functional_call(block, dict(weights), args, kwargs, tie_weights=False)
    return total


def _at_once(layer: nn.Module, x: Tensor) -> int:
    """Return how many samples of a layer's input (N, ...) unfold at once: of large images fewer than all."""
    unfolded = 4 * x[0].numel() * math.prod(getattr(layer, "kernel_size", (1,)))  # bytes, with a stride of 1
    return max(1, min(len(x), ON_DEVICE // (2 * unfolded)))  # twice, since the rows are copied once more


def _columns(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's input as rows (M, K) that multiply its flattened weight (C, K)."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)  # (N, ..., K) -> (M, K)
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    if isinstance(layer.padding, str):  # "same", which unfold does not take
        return None
    # (N, C, H, W) -> (N, K, L): K = C * kh * kw, in the order of the flattened weight; L positions of the kernel
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)  # (N, K, L) -> (N * L, K)


def _float_start(
    block: nn.Module, layers: Sequence[LayerWeight], io: BlockIO, generator: torch.Generator
) -> list[Tensor]:
    return [adaround.initial_logits(w.weight, w.scale) for w in layers]


STARTS = {RoundingStart.FLOAT: _float_start, RoundingStart.GPTQ: gptq_logits}
