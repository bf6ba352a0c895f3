"""Fit the rounding of one block so that its output matches the float block's (BRECQ / AdaRound, asymmetric inputs)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from calib import adaround, affine
from calib.adaround import LayerWeight
from calib.blocks import Block, BlockIO
from calib.choices import Rounding
from calib.omega import PerSample

WeightLoss = Callable[[Sequence[Tensor], BlockIO], Tensor]  # the losses (n,) of a recording, of the layers' weights

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
        scale = scales[name].to(weight.device)  # a plan's lie on the host
        weights.append(LayerWeight(key=key, weight=weight, scale=scale, bits=bits[name]))
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


def weight_loss(block: nn.Module, layers: Sequence[LayerWeight]) -> WeightLoss:
    """Return the block's loss of each sample as a function of its weights (BRECQ, arXiv 2102.05426).

    Args:
        block: its module.
        layers: names of the weights.
    """
    return lambda weights, io: block_loss(block, layers, weights, io)


def fine_grained_loss(
    block: nn.Module, reference: nn.Module, layers: Sequence[LayerWeight], weight: float
) -> WeightLoss:
    """Return the block's loss plus `weight` times those of its layers, the last one left out (EDA-DM, FBR).

    A layer's loss compares its output in the block with that in the float block, on float inputs; the recording must
    have them.

    Args:
        block: its module, on quantized inputs.
        reference: the same block of the float network.
        layers: names of the weights.
        weight: gamma.
    """
    inner = [layer.key.removesuffix(".weight") for layer in layers[:-1]]

    def loss(weights: Sequence[Tensor], io: BlockIO) -> Tensor:
        assert io.reference is not None
        with torch.no_grad(), _outputs(reference, inner) as expected:
            args, kwargs = replace(io, inputs=io.reference).call()
            reference(*args, **kwargs)
        with _outputs(block, inner) as outputs:
            total = block_loss(block, layers, weights, io)
        for name in inner:
            total = total + weight * output_loss(outputs[name], expected[name])
        return total

    return loss


def of_logits(loss: WeightLoss, layers: Sequence[LayerWeight]) -> PerSample:
    """Return a loss of weights as one of the rounding logits V that give the weights.

    Args:
        loss: of each sample.
        layers: float weights and grids, in the order of the logits.
    """

    def losses(logits: Sequence[Tensor], io: BlockIO) -> Tensor:
        soft = [adaround.soft_weight(w.weight, w.scale, v, w.bits) for w, v in zip(layers, logits, strict=True)]
        return loss(soft, io)

    return losses


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
