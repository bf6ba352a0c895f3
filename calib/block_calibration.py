"""Calibrate one block: align the sample scores, learn the rounding, harden it; with QDrop or LSQ learn grids too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calib import affine, gptq, learned_grids, omega, reconstruct
from calib.adaround import LayerWeight
from calib.block_state import BlockState
from calib.blocks import Block, BlockIO
from calib.choices import ActivationLearning
from calib.config import QuantConfig
from calib.data import CalibrationSet, Split
from calib.fitting import Fit, fit_rounding
from calib.learned_grids import LearnedGrid
from calib.omega import PerSample, Recordings
from calib.progress import ProgressMeter
from calib.reconstruct import WeightLoss
from calib.sample_store import SampleStore
from calib.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration under way.

    Attributes:
        model: the float network.
        network: its copy, which is quantized in place, block by block.
        scales: weight scales (C,) by layer name.
        bits: weight bits by layer name.
        data: all samples; activation ranges are observed on them.
        samples: those that calibrate weights, in training and validation samples.
        config: the settings.
        key: identifies this calibration among the saved blocks.
        store: where recordings go, and in its folder, if it has one, finished blocks.
        meter: reports the progress.
    """

    model: nn.Module
    network: nn.Module
    scales: Mapping[str, Tensor]
    bits: Mapping[str, int]
    data: CalibrationSet
    samples: Split
    config: QuantConfig
    key: str
    store: SampleStore
    meter: ProgressMeter

    def generator(self, block: Block, purpose: str) -> torch.Generator:
        """Return the generator of one purpose in one block.

        Each purpose has another one, so that rules of omega are compared on the same mini-batches.
        """
        return generator_for(self.config.seed, block.name, purpose)


def calibrate_block(
    calibration: Calibration, block: Block, io: BlockIO, scores: Tensor, on_iteration: Callable[[int], None]
) -> BlockState:
    """Align, reconstruct and harden one block.

    Args:
        calibration: its network is quantized up to this block.
        block: the block.
        io: recording of all samples that calibrate weights.
        scores: (N,) float64, the sample scores after the block before.
        on_iteration: called with the number of finished iterations.

    Returns:
        The codes, learned grids, scores and losses after this block.
    """
    config = calibration.config
    settings = config.reconstruction
    meter = calibration.meter
    module = calibration.network.get_submodule(block.name) if block.module is None else block.module
    layers = reconstruct.layer_weights(module, block, calibration.scales, calibration.bits)
    train = io.part(calibration.samples.train)
    with meter.phase("start"):
        logits = gptq.first_logits(config, block.name, module, layers, train)
    loss = _loss(calibration, block, module, layers, fine=train.reference is not None)
    qdrop = settings.activations is ActivationLearning.QDROP
    grids = _initial_grids(calibration, block, module, train) if qdrop else []
    with meter.phase("meta"):
        scores = _aligned(calibration, block, reconstruct.of_logits(loss, layers), logits, io, scores)
    # QDrop learns the rounding against activations that are rounded at random places, with grids learned along.
    rounded = learned_grids.rounded_inputs(module, grids, settings.drop, calibration.generator(block, "drop"))
    with meter.phase("fit"), rounded:
        generator = calibration.generator(block, "fit")
        fit = Fit(omega=config.omega, settings=settings, scores=scores, generator=generator, on_iteration=on_iteration)
        start = list(zip(layers, logits, strict=True))
        logits = fit_rounding(loss, start, train, fit, [grid.scale for grid in grids])
    # Now every input is rounded, as it will be in the engine.
    with meter.phase("decide"), learned_grids.rounded_inputs(module, grids):
        codes, result = reconstruct.harden(module, block, layers, logits, train)
    if settings.activations is ActivationLearning.LSQ:
        with meter.phase("activations"):
            weights = [affine.dequantize_weight(c, w.scale) for c, w in zip(codes, layers, strict=True)]
            grids = _grids_after(calibration, block, layers, weights, train, on_iteration)
    return BlockState(
        codes={name: integers.cpu() for name, integers in zip(block.layers, codes, strict=True)},
        grids={name: grid.current for grid in grids for name in block.layers if block.inner(name) in grid.layers},
        scores=scores,
        result=result,
    )


def _loss(
    calibration: Calibration, block: Block, module: nn.Module, layers: Sequence[LayerWeight], *, fine: bool
) -> WeightLoss:
    """Return the loss that the rounding is learned on, with the losses of inner layers if `fine` and the settings."""
    weight = calibration.config.reconstruction.fine
    if not (fine and weight):
        return reconstruct.weight_loss(module, layers)
    return reconstruct.fine_grained_loss(module, calibration.model.get_submodule(block.name), layers, weight)


def _aligned(
    calibration: Calibration, block: Block, loss: PerSample, logits: Sequence[Tensor], io: BlockIO, scores: Tensor
) -> Tensor:
    """Return the sample scores (N,) after this block's meta-updates."""
    samples = calibration.samples
    recordings = Recordings(train=io.part(samples.train), validation=io.part(samples.validation), group=samples.group)
    generator = calibration.generator(block, "meta")
    return omega.align_scores(loss, logits, recordings, scores, calibration.config.omega, generator)


def _initial_grids(calibration: Calibration, block: Block, module: nn.Module, io: BlockIO) -> list[LearnedGrid]:
    """Return the grids that a block's layers start from; none for the temporal block, which has no module to hook."""
    if block.module is not None:
        return []
    layers = [block.inner(name) for name in block.layers]
    generator = calibration.generator(block, "activations")
    return learned_grids.initial_grids(module, layers, io, calibration.config.activation, generator)


def _grids_after(
    calibration: Calibration,
    block: Block,
    layers: Sequence[LayerWeight],
    weights: Sequence[Tensor],
    io: BlockIO,
    on_iteration: Callable[[int], None],
) -> list[LearnedGrid]:
    """Learn a block's activation grids with its weights rounded, on inputs of the float network (Q-Diffusion)."""
    if io.reference is None:  # the temporal block
        return []
    settings = calibration.config.reconstruction
    module = calibration.network.get_submodule(block.name)
    io = replace(io, inputs=io.reference)
    grids = _initial_grids(calibration, block, module, io)
    fit = Fit(
        omega=calibration.config.omega,
        settings=replace(settings, iterations=settings.activation_iterations),
        scores=torch.zeros(len(io), dtype=torch.float64),  # every sample weighs the same
        generator=calibration.generator(block, "lsq"),
        on_iteration=lambda done: on_iteration(settings.iterations + done),
    )
    with learned_grids.rounded_inputs(module, grids):
        # No logits: the weights are decided, and the scales alone are learned.
        fit_rounding(
            lambda _, part: reconstruct.block_loss(module, layers, weights, part),
            [],
            io,
            fit,
            [grid.scale for grid in grids],
        )
    return grids
