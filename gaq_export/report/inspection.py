"""What `inspect` measures in a finished run, as numbers; `figures` draws them and `page` writes them down.

In: the float model, its plan, and the samples it was calibrated with. The gradients come from `calib.diagnose`; this
module chooses the samples and adds what needs a sampler: how far the quantized network's noise prediction is from the
float one's, step by step, on trajectories that calibration did not see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from gaq_export.errors import GaqError
from gaq_export.evaluation import noise_sqnr
from gaq_export.evaluation.noise_sqnr import NoiseSqnr, OnStage
from gaq_export.models import provenance
from gaq_export.models.loader import LoadedModel

FEW = 4  # samples a step where every block, or layer, is looked at
SENSED = 5  # steps at which every layer is looked at
PRODUCTS = "attention products"


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Grids of one layer.

    Attributes:
        covered: least, median and largest share over the channels: scale * largest code / max|w| of the channel.
            At 1 the grid just reaches max|w|; the most negative code lies one scale further out.
        input_reach: the largest value of the input's grid, in the activations' own unit.
    """

    name: str
    channels: int
    weight_bits: int
    covered: tuple[float, float, float]
    input_bits: int
    input_reach: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that a page shows beside the plan itself.

    `agreement` and `alignment` are of the chosen block, with every training sample; `overview` has each block, with FEW
    samples a step. They are None, or empty, where the plan has no block that can be looked at alone; `alignment` is
    also None where all samples weigh the same. `sensitivity` is what the function of that name returns.
    """

    train: int
    validation: int
    overview: tuple[Agreement, ...]
    agreement: Agreement | None
    alignment: Alignment | None
    noise: NoiseSqnr
    sensitivity: Mapping[str, float]
    ranges: tuple[LayerRange, ...]


def examine(
    model: LoadedModel,
    plan: QuantPlan,
    data: CalibrationSet,
    *,
    block: str | None,
    images: int,
    scratch: Path,
    on_step: OnStage,
) -> Inspection:
    """Measure everything.

    Args:
        model: the float model.
        plan: made from it.
        data: the samples it was calibrated with, all of them.
        block: which one to look into; the one with the largest loss at nearest rounding if None.
        images: fresh trajectories on which the predicted noise is compared.
        scratch: folder for recordings too large for memory.
        on_step: told what is at work, how much of it is done, of how much.

    Raises:
        GaqError, CalibError: no images, an unknown block, or a plan that belongs to other samples.
    """
    if images < 1:
        raise GaqError(f"Found {images} images to measure with; ask for 1 or more.")
    model = provenance.rewritten(model, plan)
    float_network, network = model.network, fake_quantized(model.network, plan, activations=False)
    blocks = diagnose.inspectable_blocks(
        float_network, plan, model.shape, model.schedule.num_train, model.condition_inputs
    )
    chosen = diagnose.choose_block(blocks, block)
    subset = weight_samples(data, plan.config, model.network)
    few = _some_of_each_step(subset.data.take(subset.train), FEW)
    overview = []
    with open_recorder(float_network, network, few, plan.config.micro_batch) as recording:
        for i, b in enumerate(blocks):
            place = Block(name=b.name, layers=b.layers)
            overview.append(diagnose.agreement(float_network, plan, b, recording.record(place), few.step))
            recording.finish(place)
            on_step("comparing gradients, block", i + 1, len(blocks))
    agreement, alignment = (
        _look_into(chosen, model, network, plan, subset, scratch, on_step) if chosen else (None, None)
    )
    return Inspection(
        train=len(subset.train),
        validation=len(subset.validation),
        overview=tuple(overview),
        agreement=agreement,
        alignment=alignment,
        noise=noise_sqnr.of_plan(model, plan, images, on_step),
        sensitivity=sensitivity(model, plan, data, on_step),
        ranges=layer_ranges(model, plan),
    )


def _look_into(
    block: BlockResult,
    model: LoadedModel,
    network: nn.Module,
    plan: QuantPlan,
    subset: Split,
    scratch: Path,
    on_step: OnStage,
) -> tuple[Agreement, Alignment | None]:
    """Compare one block's gradients with every training sample, and with omega unless all samples weigh the same."""
    weighted = len(torch.unique(plan.scores)) > 1

    def report_step(done: int) -> None:
        on_step(f"looking into {block.name}", done, 3 if weighted else 2)

    with open_recorder(model.network, network, subset.data, plan.config.micro_batch, scratch) as recording:
        io = recording.record(Block(name=block.name, layers=block.layers))
        train, held_out = io.part(subset.train), io.part(subset.validation)
        report_step(1)
        agreement = diagnose.agreement(model.network, plan, block, train, subset.data.step[subset.train])
        report_step(2)
        if not weighted:
            return agreement, None
        alignment = diagnose.alignment(model.network, plan, block, train, held_out)
        report_step(3)
    return agreement, alignment


def sensitivity(model: LoadedModel, plan: QuantPlan, data: CalibrationSet, on_step: OnStage) -> dict[str, float]:
    """Return the error of the predicted noise with one layer alone as the plan has it, in network order.

    It is |eps_hat - eps|^2 / |eps|^2 over FEW samples of each of SENSED steps, evenly spread. Products inside
    attention, where the plan rounds them, are one more entry, PRODUCTS, all of them together.
    """
    steps = torch.unique(data.step)
    chosen = steps[torch.linspace(0, len(steps) - 1, min(SENSED, len(steps))).round().long()]
    few = _some_of_each_step(data.take(torch.isin(data.step, chosen).nonzero()[:, 0]), FEW)
    alone = {name: replace(plan, layers={name: layer}, products={}) for name, layer in plan.layers.items()}
    if plan.products:
        alone[PRODUCTS] = replace(plan, layers={})
    found: dict[str, float] = {}
    with torch.no_grad():
        exact = model.network(*few.inputs()).double()
        for name, part in alone.items():
            error = fake_quantized(model.network, part)(*few.inputs()).double() - exact
            found[name] = float(error.square().sum() / exact.square().sum())
            on_step("quantizing one layer alone", len(found), len(alone))
    return found


def layer_ranges(model: LoadedModel, plan: QuantPlan) -> tuple[LayerRange, ...]:
    """Return how far each layer's grids reach, in network order."""
    found = []
    for name, q in plan.layers.items():
        weight = model.network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        widest = weight.detach().flatten(1).abs().amax(1)
        covered = torch.where(widest > 0, q.weight_scale * integer_range(q.weight_bits)[1] / widest, 1.0)
        found.append(
            LayerRange(
                name=name,
                channels=len(widest),
                weight_bits=q.weight_bits,
                covered=(float(covered.min()), float(covered.median()), float(covered.max())),
                input_bits=q.input.bits,
                input_reach=q.input.scale * (integer_range(q.input.bits)[1] - min(q.input.zero)),
            )
        )
    return tuple(found)


def _some_of_each_step(data: CalibrationSet, count: int) -> CalibrationSet:
    """Return `count` samples of each step, evenly spread: with guidance the first half of them is told nothing."""
    members = [(data.step == s).nonzero()[:, 0] for s in torch.unique(data.step)]
    return data.take(torch.cat([m[torch.linspace(0, len(m) - 1, min(count, len(m))).round().long()] for m in members]))
