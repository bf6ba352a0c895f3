"""Make a plan from a calibration set: calibrate, perhaps in several rounds, then measure along the sampler.

Each round after the first collects a new calibration set with the quantized network in place of the float one, and
calibrates on that (progressive alignment, TCAQ-DM, arXiv 2412.16700). A block's rounding is then learned on what the
block will see in use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calib import step_bits
from calib.calibrate import calibrate
from calib.choices import CorrectionRule, Trajectory
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, StepBits
from calib.progress import Progress
from calib.quantized_trajectory import ObservingNetwork
from gaq_export.diffusion import loop
from gaq_export.diffusion.batching import OnProgress
from gaq_export.diffusion.conditioning import Guided
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.latency import StepClock
from gaq_export.quantize.noise_correction import measure_correction
from gaq_export.quantize.trajectories import collect, image_seed, with_step_conditioning


@dataclass(frozen=True, kw_only=True)
class CalibrationCallbacks:
    """What to call while a calibration runs.

    Attributes:
        on_collect: Called with (network calls done, total) while trajectories are drawn.
        on_progress: Called after every iteration and block.
        on_correct: Called with (sampling steps done, total) while something is measured along the sampler.
    """

    on_collect: OnProgress = lambda done, total: None
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_correct: OnProgress = lambda done, total: None


SILENT = CalibrationCallbacks()


def make_plan(
    model: LoadedModel,
    data: CalibrationSet,
    config: QuantConfig,
    folder: Path,
    callbacks: CalibrationCallbacks = SILENT,
) -> QuantPlan:
    """Return the plan that the config describes, without provenance.

    Args:
        model: The float model; its sampler is the one that the plan is for.
        data: What the float network saw at each of the sampler's steps.
        config: Everything else.
        folder: Keeps finished blocks, from which an interrupted calibration continues. Beside it are the folders of
            further rounds, and `times.json` if the budget is in milliseconds.
        callbacks: What to call meanwhile.
    """
    images = _images(model, data)
    clock = StepClock(model=model, cache=folder.with_name("times.json"))
    seen = data
    plan = None
    for k in range(config.rounds):
        if plan is not None:
            quantized = replace(model, module=fake_quantized(model.network, plan))
            spec = model.spec.sampler
            # No folder: these trajectories depend on the plan, which is not part of a saved group's identity.
            on_step = callbacks.on_correct
            seen = collect(quantized, spec, images=images, seed=config.seed, by_engine=False, on_step=on_step)
        # Every round starts again from the float network, and only the samples are new.
        plan = calibrate(
            model.network,
            seen,
            config,
            timesteps=model.schedule.num_train,
            folder=folder if k == 0 else folder.with_name(f"{folder.name}-round-{k + 1}"),
            cache=model.device.cache,
            clock=clock,
            on_progress=callbacks.on_progress,
        )
    assert plan is not None  # there is at least one round
    return _measure_along_sampler(model, plan, data, callbacks.on_correct)


def _measure_along_sampler(model: LoadedModel, plan: QuantPlan, data: CalibrationSet, on_step: OnProgress) -> QuantPlan:
    """Return the plan with what its config has measured step by step: bits, ranges, a correction."""
    config = plan.config
    steps = model.spec.sampler.steps
    # In this order: ranges are observed at the bits of each step, and a correction is measured on the final network.
    if config.activation.narrower:
        plan = replace(plan, step_bits=_step_bits(model, plan, data))
    if config.activation.trajectory is Trajectory.QUANTIZED:
        network = ObservingNetwork(model.network, plan)
        seeds = [image_seed(config.seed, i) for i in range(_images(model, data))]
        loop.run(network, seeds, model.sampling(), lambda step, x, t: on_step(step + 1, steps))
        plan = network.plan
    if config.correction.rule is not CorrectionRule.NONE:
        quantized = fake_quantized(model.network, plan)
        plan = replace(plan, correction=measure_correction(model, quantized, data, config, on_step))
    return plan


def _images(model: LoadedModel, data: CalibrationSet) -> int:
    """Return the number of images that the samples are of: guidance makes two samples of each at every step."""
    # Every step has as many samples, so those of step 0 are counted.
    return int(torch.bincount(data.step)[0]) // (2 if model.guided else 1)


def _step_bits(model: LoadedModel, plan: QuantPlan, data: CalibrationSet) -> StepBits:
    """Return how many bits the activations of each sampling step get."""
    window = plan.config.activation.wide_window
    if window is not None:
        return step_bits.by_window(plan, window)
    # PTQD's criterion: the predicted noise needs a better ratio, in dB, than x_t has of image to noise.
    signal = model.schedule.alpha_bar[plan.timesteps]  # (S,)
    required = (10 * torch.log10(signal / (1 - signal))).tolist()
    if not model.guided:
        return step_bits.by_ratio(model.network, plan, data, required)
    # With guidance, what the sampler gets is the guided noise.
    return step_bits.by_ratio(model.network, plan, with_step_conditioning(data, model.conditioning), required, Guided)
