"""What is measured along the sampler once the weights are quantized: ranges on its own trajectory, corrections."""

from collections.abc import Callable
from dataclasses import replace

import torch

from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from calib.progressive import Progressive
from gaq_export import corrections, samplers
from gaq_export.collect import image_seed
from gaq_export.models import LoadedModel
from gaq_export.schedule import SamplerSpec


def finish(
    model: LoadedModel,
    plan: QuantPlan,
    spec: SamplerSpec,
    data: CalibrationSet,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> QuantPlan:
    """Return the plan with what its config asks for beyond `calib.calibrate`; as it is, if that is nothing.

    Args:
        model: the float model.
        plan: just calibrated.
        spec: the sampler.
        data: what the float network saw at each of its steps.
        on_step: told how many sampling steps are measured, of how many.
    """
    config = plan.config
    if config.activation.trajectory == "quantized":
        network = Progressive(model.network, plan)
        seeds = [image_seed(config.seed, i) for i in range(int(torch.bincount(data.step)[0]))]
        samplers.run(
            network, seeds, model.shape, model.schedule, spec, lambda step, x, t: on_step(step + 1, spec.steps)
        )
        plan = network.plan
    if config.correction.rule != "none":
        fake = fake_quantized(model.network, plan)
        plan = replace(plan, correction=corrections.measure(model, fake, spec, data, config, on_step))
    return plan
