"""One block: align the sample scores, learn the rounding, harden it, and learn activation grids where that is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calib import affine, gptq, learned_grids, omega, reconstruct
from calib.block_state import BlockState
from calib.blocks import Block, BlockIO
from calib.choices import ActivationLearning
from calib.config import QuantConfig
from calib.data import Split
from calib.learned_grids import LearnedGrid
from calib.progress import ProgressMeter
from calib.reconstruct import LayerWeight
from calib.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the calibration of every block needs: the float `model`, and the `network` that is quantized in place."""

    model: nn.Module
    network: nn.Module
    scales: Mapping[str, Tensor]
    bits: Mapping[str, int]
    subset: Split
    config: QuantConfig
    key: str
    folder: Path | None
    meter: ProgressMeter


def calibrate_block(
    calibration: Calibration, block: Block, io: BlockIO, scores: Tensor, on_iteration: Callable[[int], None]
) -> BlockState:
    """Align, reconstruct and harden one block.

    Each part draws from a stream of its own, so that rules of omega are compared on the same mini-batches.
    """
    config, meter, r = calibration.config, calibration.meter, calibration.config.reconstruction
    module = calibration.network.get_submodule(block.name) if block.module is None else block.module
    layers = reconstruct.layer_weights(module, block, calibration.scales, calibration.bits)
    train, validation = io.part(calibration.subset.train), io.part(calibration.subset.validation)
    with meter.phase("start"):
        logits = gptq.first_logits(config, block.name, module, layers, train)
    loss = reconstruct.per_sample_loss(module, layers)
    if train.reference is not None and r.fine:
        loss = reconstruct.fine_grained_loss(module, calibration.model.get_submodule(block.name), layers, r.fine)
    learned = _first_grids(calibration, block, module, train) if r.activations is ActivationLearning.QDROP else []
    with meter.phase("meta"):
        drawn = generator_for(config.seed, block.name, "meta")
        scores = omega.align_scores(
            loss, logits, train, validation, calibration.subset.group, scores, config.omega, drawn
        )
    with (
        meter.phase("fit"),
        learned_grids.rounded_inputs(module, learned, r.drop, generator_for(config.seed, block.name, "drop")),
    ):
        drawn, steps = generator_for(config.seed, block.name, "fit"), [grid.step for grid in learned]
        logits = reconstruct.fit_rounding(loss, logits, train, scores, config.omega, r, drawn, on_iteration, steps)
    with meter.phase("decide"), learned_grids.rounded_inputs(module, learned):
        codes, result = reconstruct.harden(module, block.name, block.layers, layers, logits, train)
    if r.activations is ActivationLearning.LSQ:
        with meter.phase("activations"):
            learned = _grids_after(calibration, block, module, layers, codes, train, on_iteration)
    grids = {name: grid.grid for grid in learned for name in block.layers if block.inner(name) in grid.layers}
    return BlockState(codes=dict(zip(block.layers, codes, strict=True)), grids=grids, scores=scores, result=result)


def _first_grids(calibration: Calibration, block: Block, module: nn.Module, io: BlockIO) -> list[LearnedGrid]:
    """Return the grids that a block's layers start from; none for a part that the network does not have as a module."""
    if block.module is not None:
        return []
    inner = [block.inner(name) for name in block.layers]
    drawn = generator_for(calibration.config.seed, block.name, "activations")
    return learned_grids.initial_grids(module, inner, io, calibration.config.activation, drawn)


def _grids_after(
    calibration: Calibration,
    block: Block,
    module: nn.Module,
    layers: Sequence[LayerWeight],
    codes: Sequence[Tensor],
    io: BlockIO,
    on_iteration: Callable[[int], None],
) -> list[LearnedGrid]:
    """Learn the block's activation grids with its weights rounded, on inputs of the float network (Q-Diffusion)."""
    if io.reference is None:
        return []
    config, r = calibration.config, calibration.config.reconstruction
    io = replace(io, inputs=io.reference)
    learned = _first_grids(calibration, block, module, io)
    fixed = [affine.dequantize_weight(c, w.scale) for c, w in zip(codes, layers, strict=True)]
    with learned_grids.rounded_inputs(module, learned):
        reconstruct.fit_rounding(
            lambda _, part: reconstruct.block_loss(module, layers, fixed, part),
            [],
            io,
            torch.zeros(len(io), dtype=torch.float64),
            config.omega,
            replace(r, iterations=r.activation_iterations),
            generator_for(config.seed, block.name, "lsq"),
            lambda done: on_iteration(r.iterations + done),
            [grid.step for grid in learned],
        )
    return learned
