"""From trajectories to a finished plan: calibrate, again on what the quantized network draws, measure what is left.

Rounds after the first collect a new calibration set with the quantized network in place of the float one, and
reconstruct on that (progressive alignment, TCAQ-DM, arXiv 2412.16700): what blocks see when they are fitted is then
what they will see in use.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calib import step_bits
from calib.calibrate import calibrate
from calib.choices import CorrectionRule, Trajectory
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.mixed_precision import Clock
from calib.plan import QuantPlan, StepBits
from calib.progress import Progress
from calib.quantized_trajectory import ObservingNetwork
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_correction
from gaq_export.quantize.trajectories import collect, image_seed, with_step_conditioning

OnProgress = Callable[[int, int], None]


def learn(
    model: LoadedModel,
    data: CalibrationSet,
    config: QuantConfig,
    spec: SamplerSpec,
    *,
    about: Mapping[str, Any] | None = None,
    folder: Path,
    clock: Clock | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_step: OnProgress = lambda done, total: None,
) -> QuantPlan:
    """Return the plan that the config asks for.

    Args:
        model: the float model.
        data: what it saw at each of the sampler's steps.
        config: everything else.
        spec: the sampler.
        about: copied into the plan.
        folder: finished blocks are kept here, those of later rounds in folders beside it.
        clock: measures milliseconds, for a budget of those.
        on_progress: told after every iteration and block.
        on_step: told how many sampling steps something was measured at, of how many.
    """
    images = _images(model, data)
    own, plan = data, None
    for k in range(config.rounds):
        place = folder if k == 0 else folder.with_name(f"{folder.name}-round-{k + 1}")
        if plan is not None:
            drawing = replace(model, module=fake_quantized(model.network, plan))
            own = collect(drawing, spec, images=images, seed=config.seed, on_step=on_step)
        plan = calibrate(
            model.network,
            own,
            config,
            timesteps=model.schedule.num_train,
            provenance=about,
            folder=place,
            clock=clock,
            on_progress=on_progress,
        )
    assert plan is not None
    return _finish(model, plan, spec, data, on_step)


def _finish(
    model: LoadedModel, plan: QuantPlan, spec: SamplerSpec, data: CalibrationSet, on_step: OnProgress
) -> QuantPlan:
    """Return the plan with what is measured along the sampler: bits of steps, ranges on its own path, corrections."""
    config = plan.config
    if config.activation.narrower:
        plan = replace(plan, step_bits=_step_bits(model, plan, data))
    if config.activation.trajectory is Trajectory.QUANTIZED:
        network = ObservingNetwork(model.network, plan)
        seeds = [image_seed(config.seed, i) for i in range(_images(model, data))]
        loop.run(network, seeds, model.sampling(spec), lambda step, x, t: on_step(step + 1, spec.steps))
        plan = network.plan
    if config.correction.rule is not CorrectionRule.NONE:
        fake = fake_quantized(model.network, plan)
        plan = replace(plan, correction=noise_correction.measure(model, fake, spec, data, config, on_step))
    return plan


def _images(model: LoadedModel, data: CalibrationSet) -> int:
    """Return how many images the samples of each step are of: with guidance there are two of each."""
    guided = model.conditioning is not None and model.conditioning.guided
    return int(torch.bincount(data.step)[0]) // (2 if guided else 1)


def _step_bits(model: LoadedModel, plan: QuantPlan, data: CalibrationSet) -> StepBits:
    """Return how many bits each step's activations get."""
    window = plan.config.activation.wide_window
    if window is not None:
        return step_bits.by_window(plan, window)
    kept = model.schedule.alpha_bar[plan.timesteps]
    required = (10 * torch.log10(kept / (1 - kept))).tolist()
    if model.conditioning is None or not model.conditioning.guided:
        return step_bits.by_ratio(model.network, plan, data, required)
    return step_bits.by_ratio(model.network, plan, with_step_conditioning(data, model.conditioning), required, Guided)
