"""Does a built engine compute what fake-quantized PyTorch does, on samples of the steps it is for?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import engines
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from engines import EngineConfig, EngineFile
from engines.machine import int8_sums_overflow
from gaq_export.deploy import parity, session
from gaq_export.deploy.parity import TOLERANCES, Parity
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.profiles import find_profile
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import provenance_of
from gaq_export.quantize.trajectories import collect, with_step_conditioning
from gaq_export.run import Run


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an engine was built for.

    Attributes:
        profile: of its graph.
        turns: activation bits of each of the sampler's steps.
        abits: the activation bits whose steps this engine takes.
    """

    profile: str
    turns: Sequence[int]
    abits: int


def samples(
    model: LoadedModel, sampler: SamplerSpec, plan: QuantPlan, run: Run, config: EngineConfig
) -> CalibrationSet:
    """Return samples of the sampler's steps: the calibration's, if they are of the same sampler."""
    count = max(config.batch[0], min(config.batch[2], parity.IMAGES))
    folder = run.calibration if sampler == provenance_of(plan).sampler else None
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
    profile, record = find_profile(target.profile), record_of(file)
    guided = record.whole_steps and model.conditioning is not None and model.conditioning.guided
    data = with_step_conditioning(data, model.conditioning if record.whole_steps else None)
    data = data.take((torch.tensor(target.turns)[data.step] == target.abits).nonzero()[:, 0])
    # Products inside attention stay float where the runtime has no unsigned codes for probabilities.
    rounded = plan if profile.unsigned_products else replace(plan, products={})
    reference = fake_quantized(model.network, rounded, float8=profile.float8)
    layers = [name for name in plan.layers if name not in record.tables]
    if guided:
        reference = Guided(reference)
        layers = [f"network.{name}" for name in layers]
    with engines.open_engine(file) as opened:
        result = parity.compare(
            reference,
            layers,
            session.noise_predictor(opened, file),
            data,
            TOLERANCES[target.profile],
            compute=file.compute,
            images=max(file.batch[0], min(file.batch[2], parity.IMAGES)),
        )
    if not result.passed:
        worst = result.worst
        raise GaqError(
            f"The {file.backend} engine differs from fake-quantized PyTorch: SQNR {result.sqnr_db[worst]:.1f} dB at "
            f"step {result.steps[worst]}, at least {result.required_db(worst):.1f} dB expected. Nothing was replaced; "
            f"{_advice(file.backend, plan)}"
        )
    return result


def _advice(backend: str, plan: QuantPlan) -> str:
    wide = any(layer.weight_bits == 8 for layer in plan.layers.values())
    if wide and backend in ("openvino", "onnxruntime") and int8_sums_overflow():
        return (
            "this processor has no VNNI, and sums of 8-bit weights' products overflow on it: give --wbits 7 or fewer."
        )
    return "try another --backend."
