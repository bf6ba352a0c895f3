"""Does a built engine compute what fake-quantized PyTorch does, on samples of the steps it is for?"""

from collections.abc import Sequence
from dataclasses import replace

import torch

import engines
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from engines import EngineConfig, EngineFile
from engines.machine import int8_sums_overflow
from gaq_export.deploy import parity, session
from gaq_export.deploy.parity import TOLERANCES, Parity
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.profiles import QdqProfile, find_profile
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.trajectories import collect, with_step_conditioning
from gaq_export.run import Run


def samples(model: LoadedModel, spec: SamplerSpec, plan: QuantPlan, run: Run, config: EngineConfig) -> CalibrationSet:
    """Return samples of the sampler's steps: the calibration's, if they are of the same sampler."""
    count = max(config.batch[0], min(config.batch[2], parity.IMAGES))
    folder = run.calibration if spec == SamplerSpec.from_json(plan.provenance["sampler"]) else None
    return collect(model, spec, images=max(2, count), seed=plan.config.seed, folder=folder)


def _taken(plan: QuantPlan, profile_spec: QdqProfile) -> QuantPlan:
    """Return what a target takes of the plan."""
    return plan if profile_spec.unsigned_products else replace(plan, products={})


def check(
    file: EngineFile,
    plan: QuantPlan,
    model: LoadedModel,
    data: CalibrationSet,
    profile: str,
    turns: Sequence[int],
    abits: int,
) -> Parity:
    """Compare the engine with fake-quantized PyTorch on samples of its steps; raise GaqError below the floor."""
    profile_spec, count = find_profile(profile), max(file.batch[0], min(file.batch[2], parity.IMAGES))
    data = with_step_conditioning(data, model.conditioning if file.about["graph"] == "step" else None)
    data = data.take((torch.tensor(turns)[data.step] == abits).nonzero()[:, 0])
    left = [name for name in plan.layers if name not in file.about["baked"]]
    reference = fake_quantized(model.network, _taken(plan, profile_spec), float8=profile_spec.float8)
    if file.about["graph"] == "step" and model.conditioning is not None and model.conditioning.guided:
        reference, left = Guided(reference), [f"network.{name}" for name in left]
    with engines.open_engine(file) as opened:
        result = parity.compare(
            reference,
            left,
            session.noise_of(opened, file, model.schedule),
            data,
            TOLERANCES[profile],
            compute=file.compute,
            images=count,
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
