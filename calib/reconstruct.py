"""Fit the rounding of one block so that its output matches the float block's (BRECQ / AdaRound, asymmetric inputs)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from calib import adaround, affine
from calib.blocks import Block, BlockIO
from calib.choices import ActivationLearning, Rounding
from calib.config import OmegaConfig, ReconstructionConfig
from calib.omega import PerSample, weighting

COMPARED_SAMPLES = 256  # samples, evenly spread over the steps, that nearest and learned rounding are compared on


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """How well the rounding of one block fits.

    Attributes:
        name: of the block.
        layers: its quantized layers.
        loss_before: mean block loss with nearest rounding, over at most COMPARED_SAMPLES.
        loss_after: the same with the rounding that the plan has.
        rounding: "adaround"; or "nearest" where learning did not beat it, or where a layer is in no block, because it
            is called several times or because no block is reconstructed (its losses are None).
    """

    name: str
    layers: tuple[str, ...]
    loss_before: NonNegativeFloat | None
    loss_after: NonNegativeFloat | None
    rounding: Rounding


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A float weight (C, ...), its scale (C,) and bits; `key` names it inside the block, e.g. "conv1.weight"."""

    key: str
    weight: Tensor
    scale: Tensor
    bits: int


def layer_weights(
    module: nn.Module, block: Block, scales: Mapping[str, Tensor], bits: Mapping[str, int]
) -> list[LayerWeight]:
    """Return copies of a block's weights with their grids, in call order.

    Args:
        module: the block's.
        block: names of its layers.
        scales: (C,) by layer name.
        bits: by layer name.
    """
    weights = []
    for name in block.layers:
        key = block.key(name)
        weight = module.get_parameter(key).detach().clone()
        weights.append(LayerWeight(key=key, weight=weight, scale=scales[name], bits=bits[name]))
    return weights


def output_loss(out: Tensor, target: Tensor) -> Tensor:
    """Return the squared error (n,), summed over axis 1 and averaged over the rest.

    Args:
        out: (n, C, ...).
        target: the same shape.
    """
    error = (out - target).square().sum(1)  # (n, C, ...) -> (n, ...)
    return error.flatten(1).mean(1) if error.ndim > 1 else error


def block_loss(block: nn.Module, layers: Sequence[LayerWeight], weights: Sequence[Tensor], io: BlockIO) -> Tensor:
    """Return the losses (n,) of the n samples in `io`, with the block's weights replaced by `weights`.

    Args:
        block: the block's module; the weights in it do not matter.
        layers: names of the weights.
        weights: one for each of `layers`, differentiable.
        io: samples in memory.
    """
    args, kwargs = io.call()
    named = {layer.key: w for layer, w in zip(layers, weights, strict=True)}
    assert isinstance(io.target, Tensor)  # samples taken from a recording are in memory
    # Layers that share one weight in the float network each get codes of their own.
    return output_loss(torch.func.functional_call(block, named, args, kwargs, tie_weights=False), io.target)


def per_sample_loss(block: nn.Module, layers: Sequence[LayerWeight]) -> PerSample:
    """Return the block's loss of each sample as a function of its rounding logits (BRECQ, arXiv 2102.05426).

    Args:
        block: its module.
        layers: float weights and grids, in the order of the logits.
    """

    def loss(logits: Sequence[Tensor], io: BlockIO) -> Tensor:
        soft = [adaround.soft_weight(w.weight, w.scale, v, w.bits) for w, v in zip(layers, logits, strict=True)]
        return block_loss(block, layers, soft, io)

    return loss


def fine_grained_loss(
    block: nn.Module, reference: nn.Module, layers: Sequence[LayerWeight], weight: float
) -> PerSample:
    """Return the block's loss plus `weight` times those of its layers, the last one left out (EDA-DM, FBR).

    A layer's loss compares its output in the block with that in the float block, on float inputs; the recording must
    have them.

    Args:
        block: its module, on quantized inputs.
        reference: the same block of the float network.
        layers: float weights and grids, in the order of the logits.
        weight: gamma.
    """
    plain = per_sample_loss(block, layers)
    inner = [layer.key.removesuffix(".weight") for layer in layers[:-1]]

    def loss(logits: Sequence[Tensor], io: BlockIO) -> Tensor:
        assert io.reference is not None
        with torch.no_grad(), _outputs(reference, inner) as expected:
            args, kwargs = replace(io, inputs=io.reference).call()
            reference(*args, **kwargs)
        with _outputs(block, inner) as outputs:
            total = plain(logits, io)
        for name in inner:
            total = total + weight * output_loss(outputs[name], expected[name])
        return total

    return loss


@contextmanager
def _outputs(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that the output of each named submodule is put into, as they are computed."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: seen.update({name: out})

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a rounding is fitted.

    Attributes:
        omega: how scores become weights.
        settings: iterations, batch, learning rates and annealing.
        scores: (N,) float64 sample scores; equal scores give plain AdaRound.
        generator: draws the mini-batches.
        on_iteration: called with the number of finished iterations.
    """

    omega: OmegaConfig
    settings: ReconstructionConfig
    scores: Tensor
    generator: torch.Generator
    on_iteration: Callable[[int], None] = lambda done: None


def fit_rounding(
    loss: PerSample, logits: Sequence[Tensor], io: BlockIO, fit: Fit, scales: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Return the logits after minimising sum_i omega_i l_i + lambda sum(1 - |2h - 1|^beta) with Adam.

    Args:
        loss: the block's loss of each sample.
        logits: V to start from, each the shape of its weight.
        io: recording of the N training samples.
        fit: how.
        scales: activation scales () that `loss` depends on; learned along with the logits, in place.
    """
    settings = fit.settings
    values = [v.detach().clone().requires_grad_() for v in logits]
    share = settings.drop if settings.activations is ActivationLearning.QDROP else 0.0
    groups: list[dict[str, Any]] = [{"params": values, "lr": settings.learning_rate}, {"params": [*scales]}]
    optimiser = torch.optim.Adam(groups)
    weights_of = weighting(fit.scores, fit.omega)
    for i in range(settings.iterations):
        # The scales' rate falls to 0 along a cosine, as in QDrop; the logits' stays as it is.
        falling = 0.5 + 0.5 * math.cos(math.pi * i / settings.iterations)
        optimiser.param_groups[1]["lr"] = settings.activation_learning_rate * falling
        index = torch.randperm(len(io), generator=fit.generator)[: settings.batch]
        batch = io.take(index).mixed(share, fit.generator)  # after `index`: both come from one generator
        objective = (weights_of(index).to(io.device) * loss(values, batch)).sum()
        sharpness = adaround.beta(i, settings.iterations, settings.warmup, settings.beta_start, settings.beta_end)
        if sharpness is not None:  # the warm-up finds good values before they are pressed to 0 and 1
            objective = objective + settings.regulariser * sum(adaround.regulariser(v, sharpness) for v in values)
        optimiser.zero_grad()
        torch.autograd.backward(objective)
        optimiser.step()
        fit.on_iteration(i + 1)
    return [v.detach() for v in values]


def harden(
    module: nn.Module, block: Block, layers: Sequence[LayerWeight], logits: Sequence[Tensor], io: BlockIO
) -> tuple[list[Tensor], BlockResult]:
    """Decide every rounding: as learned, or all to nearest if the block's loss is lower so.

    Args:
        module: the block's; its weights do not matter.
        block: its name, and the names of its layers.
        layers: float weights and grids.
        logits: V as learned.
        io: recording of the training samples, at most COMPARED_SAMPLES of which are compared on.

    Returns:
        int8 codes of each layer, and how well they fit.
    """
    nearest = [affine.quantize_weight(w.weight, w.scale, w.bits) for w in layers]
    learned = [adaround.hard_codes(w.weight, w.scale, v, w.bits) for w, v in zip(layers, logits, strict=True)]
    compared = io.part(torch.linspace(0, len(io) - 1, min(len(io), COMPARED_SAMPLES)).round().long())
    # Learning sees mini-batches and soft weights; only hard codes on common samples say whether it helped.
    before, after = (mean_loss(module, layers, codes, compared) for codes in (nearest, learned))
    learning_helped = after <= before
    result = BlockResult(
        name=block.name,
        layers=block.layers,
        loss_before=before,
        loss_after=after if learning_helped else before,
        rounding=Rounding.ADAROUND if learning_helped else Rounding.NEAREST,
    )
    return (learned if learning_helped else nearest), result


def mean_loss(block: nn.Module, layers: Sequence[LayerWeight], codes: Sequence[Tensor], io: BlockIO) -> float:
    """Return the block's loss with integer `codes` (C, ...) of each layer, averaged over all samples of `io`."""
    weights = [affine.dequantize_weight(c, w.scale) for w, c in zip(layers, codes, strict=True)]
    with torch.no_grad():
        chunks = torch.split(torch.arange(len(io)), 32)
        parts = [block_loss(block, layers, weights, io.take(index)).double() for index in chunks]
    return float(torch.cat(parts).mean())
