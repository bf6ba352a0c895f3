"""One block: align the sample scores, learn the rounding, harden it, and learn activation grids where that is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calib import activations, affine, gptq, omega, reconstruct
from calib.activations import Learned
from calib.blocks import Block, BlockIO
from calib.checkpoint import BlockState
from calib.config import QuantConfig
from calib.data import Split
from calib.progress import Meter
from calib.reconstruct import LayerWeight
from calib.seeds import stream


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the calibration of every block needs: the float `model`, and the `network` that is quantized in place."""

    model: nn.Module
    network: nn.Module
    scales: Mapping[str, Tensor]
    bits: Mapping[str, int]
    subset: Split
    config: QuantConfig
    key: str
    folder: Path | None
    meter: Meter


def calibrate_block(
    job: Job, block: Block, io: BlockIO, scores: Tensor, on_iteration: Callable[[int], None]
) -> BlockState:
    """Align, reconstruct and harden one block.

    Each part draws from a stream of its own, so that rules of omega are compared on the same mini-batches.
    """
    config, meter, r = job.config, job.meter, job.config.reconstruction
    module = job.network.get_submodule(block.name) if block.module is None else block.module
    layers = reconstruct.layer_weights(module, block, job.scales, job.bits)
    train, validation = io.part(job.subset.train), io.part(job.subset.validation)
    with meter.phase("start"):
        logits = gptq.first_logits(config, block.name, module, layers, train)
    loss = reconstruct.per_sample_loss(module, layers)
    if train.reference is not None and r.fine:
        loss = reconstruct.fine_loss(module, job.model.get_submodule(block.name), layers, r.fine)
    learned = _first_grids(job, block, module, train) if r.activations == "qdrop" else []
    with meter.phase("meta"):
        drawn = stream(config.seed, block.name, "meta")
        scores = omega.align(loss, logits, train, validation, job.subset.group, scores, config.omega, drawn)
    with meter.phase("fit"), activations.rounding(module, learned, r.drop, stream(config.seed, block.name, "drop")):
        drawn, steps = stream(config.seed, block.name, "fit"), [grid.step for grid in learned]
        logits = reconstruct.fit(loss, logits, train, scores, config.omega, r, drawn, on_iteration, steps)
    with meter.phase("decide"), activations.rounding(module, learned):
        codes, result = reconstruct.decide(module, block.name, block.layers, layers, logits, train)
    if r.activations == "lsq":
        with meter.phase("activations"):
            learned = _grids_after(job, block, module, layers, codes, train, on_iteration)
    grids = {name: grid.grid for grid in learned for name in block.layers if block.inner(name) in grid.layers}
    return BlockState(codes=dict(zip(block.layers, codes, strict=True)), grids=grids, scores=scores, result=result)


def _first_grids(job: Job, block: Block, module: nn.Module, io: BlockIO) -> list[Learned]:
    """Return the grids that a block's layers start from; none for a part that the network does not have as a module."""
    if block.module is not None:
        return []
    inner = [block.inner(name) for name in block.layers]
    drawn = stream(job.config.seed, block.name, "activations")
    return activations.first_grids(module, inner, io, job.config.activation, drawn)


def _grids_after(
    job: Job,
    block: Block,
    module: nn.Module,
    layers: Sequence[LayerWeight],
    codes: Sequence[Tensor],
    io: BlockIO,
    on_iteration: Callable[[int], None],
) -> list[Learned]:
    """Learn the block's activation grids with its weights rounded, on inputs of the float network (Q-Diffusion)."""
    if io.reference is None:
        return []
    config, r = job.config, job.config.reconstruction
    io = replace(io, inputs=io.reference)
    learned = _first_grids(job, block, module, io)
    fixed = [affine.dequantize_weight(c, w.scale) for c, w in zip(codes, layers, strict=True)]
    with activations.rounding(module, learned):
        reconstruct.fit(
            lambda _, part: reconstruct.block_loss(module, layers, fixed, part),
            [],
            io,
            torch.zeros(len(io), dtype=torch.float64),
            config.omega,
            replace(r, iterations=r.activation_iterations),
            stream(config.seed, block.name, "lsq"),
            lambda done: on_iteration(r.iterations + done),
            [grid.step for grid in learned],
        )
    return learned
