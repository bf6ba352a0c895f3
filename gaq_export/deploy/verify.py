"""Check that a built engine computes what fake-quantized PyTorch does, on samples of the steps that it was built for.

In: an engine file, the plan and float model behind it, and calibration samples. Out: a `Parity`, or an error that says
which step is too far off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import engines
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from engines import EngineConfig, EngineFile
from engines.machine import int8_sums_overflow
from gaq_export.deploy import parity, session
from gaq_export.deploy.parity import TOLERANCES, Parity
from gaq_export.deploy.record import EngineRecord, record_of
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.profiles import QdqProfile, find_profile
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import provenance_of
from gaq_export.quantize.trajectories import collect, with_step_conditioning
from gaq_export.run import Run


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an engine was built for.

    Attributes:
        profile: the name of its graph's profile.
        turns: activation bits of each of the sampler's steps.
        abits: activation bits of the steps that this engine takes.
    """

    profile: str
    turns: Sequence[int]
    abits: int


def samples(
    model: LoadedModel, sampler: SamplerSpec, plan: QuantPlan, run: Run, config: EngineConfig
) -> CalibrationSet:
    """Return samples of the sampler's steps: the calibration's, if it followed the same sampler."""
    count = max(config.batch[0], min(config.batch[2], parity.IMAGES))
    folder = run.calibration if sampler == provenance_of(plan).sampler else None
    # `collect` needs two images, because a calibration sets one aside for validation.
    return collect(model, sampler, images=max(2, count), seed=plan.config.seed, folder=folder)


def check(file: EngineFile, plan: QuantPlan, model: LoadedModel, data: CalibrationSet, target: Target) -> Parity:
    """Compare the engine with fake-quantized PyTorch on samples of its steps.

    Args:
        file: the engine.
        plan: the plan at the engine's activation bits.
        model: the float model.
        data: samples of all steps, from `samples`.
        target: what the engine was built for.

    Raises:
        GaqError: a step is below its parity floor.
    """
    profile = find_profile(target.profile)
    record = record_of(file)
    # An engine of whole steps guides inside, so it takes both conditions of a sample at once.
    data = with_step_conditioning(data, model.conditioning if record.whole_steps else None)
    # Bits of each step, (S,), looked up for each sample: where engines take turns, each is checked on its own steps.
    data = data.take((torch.tensor(target.turns)[data.step] == target.abits).nonzero()[:, 0])
    reference, layers = _reference(plan, model, profile, record)
    with engines.open_engine(file) as opened:
        result = parity.compare(
            reference,
            layers,
            session.noise_predictor(opened, file),
            data,
            TOLERANCES[target.profile],
            compute=file.compute,
            images=max(file.batch[0], min(file.batch[2], parity.IMAGES)),  # as many as the engine takes at once
        )
    if not result.passed:
        worst = result.worst
        raise GaqError(
            f"The {file.backend} engine differs from fake-quantized PyTorch: SQNR {result.sqnr_db[worst]:.1f} dB at "
            f"step {result.steps[worst]}, at least {result.required_db(worst):.1f} dB expected. Nothing was replaced; "
            f"{_advice(file.backend, plan)}"
        )
    return result


def _reference(
    plan: QuantPlan, model: LoadedModel, profile: QdqProfile, record: EngineRecord
) -> tuple[nn.Module, list[str]]:
    """Return what the engine should compute, as a module, and the names of its quantized layers that are left."""
    # Products inside attention stay float where the runtime has no unsigned codes for probabilities.
    rounded = plan if profile.unsigned_products else replace(plan, products={})
    reference = fake_quantized(model.network, rounded, float8=profile.float8)
    # A time table is a constant in the engine: no runtime computes its layers, so none can differ there.
    layers = [name for name in plan.layers if name not in record.tables]
    if record.whole_steps and model.guided:
        return Guided(reference), [f"network.{name}" for name in layers]  # `Guided` holds the reference as `network`
    return reference, layers


def _advice(backend: str, plan: QuantPlan) -> str:
    """Say what to try when an engine failed its check."""
    eight_bits = any(layer.weight_bits == 8 for layer in plan.layers.values())
    # Without VNNI, products are added in 16 bits that saturate; codes of 7 bits are small enough.
    if eight_bits and backend in ("openvino", "onnxruntime") and int8_sums_overflow():
        return (
            "this processor has no VNNI, and sums of 8-bit weights' products overflow on it: give --wbits 7 or fewer."
        )
    return "try another --backend."
