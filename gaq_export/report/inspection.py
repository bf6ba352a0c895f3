"""What `inspect` measures in a finished run, as numbers; `charts` draws them and `inspection_page` explains them.

In: the float model, its plan, and the samples it was calibrated with. The gradients come from `calib.diagnose`; this
module chooses the samples and adds what needs a sampler: the SQNR of the predicted noise, step by step, on trajectories
that calibration did not see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calib import diagnose
from calib.affine import integer_range
from calib.block_recording import open_recorder
from calib.blocks import Block
from calib.calibrate import weight_samples
from calib.data import CalibrationSet, Split
from calib.diagnose import Agreement, Alignment
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from calib.reconstruct import BlockResult
from calib.sample_store import SampleStore
from gaq_export.errors import GaqError
from gaq_export.models import provenance
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.noise_sqnr import NoiseSqnr, OnStage
from gaq_export.quantize.sensitivity import FEW, sensitivity, some_of_each_step


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Grids of one layer.

    Attributes:
        covered: least, median and largest share over the channels: scale * largest code / max|w| of the channel.
            At 1 the grid just reaches max|w|; the most negative code lies one scale further out.
        input_reach: the largest value of the input's grid, in the unit of the activations.
    """

    name: str
    channels: int
    weight_bits: int
    covered: tuple[float, float, float]
    input_bits: int
    input_reach: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a page shows beside the plan itself.

    Attributes:
        train: number of training samples.
        validation: number of validation samples.
        overview: gradients of each block, from FEW samples a step; empty if no block can be measured alone.
        agreement: gradients of the chosen block, from every training sample; None likewise.
        alignment: the chosen block's gradients against the sample weights; None also where all weights are equal.
        noise: SQNR of the predicted noise.
        sensitivity: error of the predicted noise with each layer quantized alone, see `sensitivity`.
        ranges: one entry a layer.
    """

    train: int
    validation: int
    overview: tuple[Agreement, ...]
    agreement: Agreement | None
    alignment: Alignment | None
    noise: NoiseSqnr
    sensitivity: Mapping[str, float]
    ranges: tuple[LayerRange, ...]


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """What a user may choose.

    Attributes:
        block: to measure closely; the one with the largest loss at nearest rounding if None.
        images: fresh trajectories on which the predicted noise is compared.
    """

    block: str | None = None
    images: int = 8


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A float model, and the plan that was made from it."""

    model: LoadedModel
    plan: QuantPlan


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is examined: the float model, the network with the plan's weights, the plan, and its training samples."""

    model: LoadedModel
    network: nn.Module
    plan: QuantPlan
    samples: Split


def examine(
    calibrated: Calibrated,
    data: CalibrationSet,
    options: InspectionOptions,
    *,
    scratch: Path,
    on_step: OnStage,
) -> Inspection:
    """Measure everything.

    Args:
        calibrated: the plan and its float model.
        data: the samples it was calibrated with, all of them.
        options: block and number of images.
        scratch: folder for recordings that are too large for memory.
        on_step: called with (what is measured, done, total).

    Raises:
        GaqError, CalibError: no images, an unknown block, or a plan that belongs to other samples.
    """
    if options.images < 1:
        raise GaqError(f"Found {options.images} images to measure with; ask for 1 or more.")
    plan = calibrated.plan
    model = provenance.rewritten(calibrated.model, plan)  # the plan's layers are those of the rewritten network
    blocks = diagnose.inspectable_blocks(
        model.network, plan, model.shape, model.schedule.num_train, model.condition_inputs
    )
    chosen = diagnose.choose_block(blocks, options.block)
    subject = _subject(model, plan, data)
    overview = _overview(subject, blocks, on_step)
    agreement, alignment = (None, None) if chosen is None else _measure_block(subject, chosen, scratch, on_step)
    return Inspection(
        train=len(subject.samples.train),
        validation=len(subject.samples.validation),
        overview=overview,
        agreement=agreement,
        alignment=alignment,
        noise=noise_sqnr.of_plan(model, plan, options.images, on_step),
        sensitivity=sensitivity(model, plan, data, on_step),
        ranges=layer_ranges(model, plan),
    )


def _subject(model: LoadedModel, plan: QuantPlan, data: CalibrationSet) -> _Subject:
    """Split the samples as calibration did, and give the network the plan's weights."""
    samples = weight_samples(data, plan.config, model.network)
    # Activations stay float, so that the gradients show nothing but the rounding of the weights.
    network = fake_quantized(model.network, plan, activations=False)
    return _Subject(model=model, network=network, plan=plan, samples=samples)


def _overview(subject: _Subject, blocks: Sequence[BlockResult], on_step: OnStage) -> tuple[Agreement, ...]:
    """Compare the gradients of the sampling steps in every block, from a few samples."""
    network = subject.model.network
    plan = subject.plan
    few = some_of_each_step(subject.samples.data.take(subject.samples.train), FEW)
    overview = []
    # One recorder for all blocks in network order, so that each is recorded from where the one before ended.
    store = SampleStore(device=few.device)
    with open_recorder(network, subject.network, few, plan.config.micro_batch, store) as recording:
        for i, result in enumerate(blocks):
            block = Block(name=result.name, layers=result.layers)
            overview.append(diagnose.agreement(network, plan, result, recording.record(block), few.step))
            recording.finish(block)
            on_step("comparing gradients, block", i + 1, len(blocks))
    return tuple(overview)


def _measure_block(
    subject: _Subject, block: BlockResult, scratch: Path, on_step: OnStage
) -> tuple[Agreement, Alignment | None]:
    """Compare the gradients of one block from every training sample, and with omega unless all weights are equal."""
    network = subject.model.network
    plan = subject.plan
    samples = subject.samples
    weighted = len(torch.unique(plan.scores)) > 1

    def report_step(done: int) -> None:
        on_step(f"looking into {block.name}", done, 3 if weighted else 2)

    store = SampleStore(folder=scratch, device=samples.data.device)
    with open_recorder(network, subject.network, samples.data, plan.config.micro_batch, store) as recording:
        io = recording.record(Block(name=block.name, layers=block.layers))
        train = io.part(samples.train)
        held_out = io.part(samples.validation)
        report_step(1)
        agreement = diagnose.agreement(network, plan, block, train, samples.data.step[samples.train])
        report_step(2)
        if not weighted:
            return agreement, None
        alignment = diagnose.alignment(network, plan, block, train, held_out)
        report_step(3)
    return agreement, alignment


def layer_ranges(model: LoadedModel, plan: QuantPlan) -> tuple[LayerRange, ...]:
    """Return how far each layer's grids reach, in network order."""
    ranges = []
    for name, q in plan.layers.items():
        weight = model.network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        widest = weight.detach().flatten(1).abs().amax(1).cpu()  # (C, ...) -> (C,); a plan is on the host
        # A channel of zeros is covered by any grid.
        covered = torch.where(widest > 0, q.weight_scale * integer_range(q.weight_bits)[1] / widest, 1.0)
        ranges.append(
            LayerRange(
                name=name,
                channels=len(widest),
                weight_bits=q.weight_bits,
                covered=(float(covered.min()), float(covered.median()), float(covered.max())),
                input_bits=q.input.bits,
                # Of the steps' zero points, the smallest reaches furthest up.
                input_reach=q.input.scale * (integer_range(q.input.bits)[1] - min(q.input.zero)),
            )
        )
    return tuple(ranges)
