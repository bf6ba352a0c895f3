"""Measure a `calib.correction.Correction`: compare the quantized network with the float one at the sampler's steps.

In: a float model, its quantized network, and the calibration set. Out: what the sampler takes back at each step. PTQD
compares the two networks on the float network's trajectories. TAC follows the trajectories of the corrected network:
each step is fitted after the earlier ones were corrected, and the drift of x is known. With guidance, the guided noise
is corrected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.choices import CorrectionRule
from calib.config import CorrectionConfig, QuantConfig
from calib.correction import Correction, channel_gain, regress
from calib.data import CalibrationSet
from gaq_export.diffusion import loop, samplers
from gaq_export.diffusion.batching import OnProgress, bind_in_batches
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import timesteps
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.trajectories import image_seed, with_step_conditioning

BATCH = 16  # samples that a network is called with


def measure_correction(
    model: LoadedModel,
    quantized: nn.Module,
    data: CalibrationSet,
    config: QuantConfig,
    on_step: OnProgress = lambda done, total: None,
) -> Correction:
    """Return the correction that the config describes.

    Args:
        model: The float model; its sampler is the one to correct.
        quantized: The fake-quantized network.
        data: What the float network saw at each of the sampler's steps.
        config: Says which rule, and its settings.
        on_step: Called with (sampling steps done, total).
    """
    if config.correction.rule is CorrectionRule.PTQD:
        return _ptqd(model, quantized, data, on_step)
    # Seeds of their own, because rounding was learned on the images of the calibration set.
    seeds = [image_seed(config.seed, i, "correction") for i in range(config.correction.images)]
    return _tac(model, quantized, seeds, config.correction, on_step)


@torch.no_grad()
def _ptqd(model: LoadedModel, quantized: nn.Module, data: CalibrationSet, on_step: OnProgress) -> Correction:
    """Fit, at each step, error = k * exact + bias + noise of deviation sigma, over the calibration set.

    The sampler then takes (epsilon - bias) / (1 + k), and what is left of the error has variance (sigma / (1 + k))^2.
    """
    steps = model.spec.sampler.steps
    channels = model.shape[0]
    data = with_step_conditioning(data, model.conditioning)
    float_network = Guided(model.network) if model.guided else model.network
    quantized = Guided(quantized) if model.guided else quantized
    fits = []
    for step in range(steps):
        index = (data.step == step).nonzero()[:, 0]
        exact = _predict(float_network, data, index)  # (N, C, H, W)
        predicted = _predict(quantized, data, index)
        fits.append(regress(exact, predicted - exact))
        on_step(step + 1, steps)
    return Correction(
        rule=CorrectionRule.PTQD,
        # k is one number for all channels: (S,) -> (S, C)
        gain=tuple((1 / (1 + fit.k),) * channels for fit in fits),
        bias=tuple(tuple(fit.bias.tolist()) for fit in fits),
        shift=((0.0,) * channels,) * steps,
        variance=tuple((fit.sigma / (1 + fit.k)) ** 2 for fit in fits),
        explained=tuple(fit.explained for fit in fits),
    )


def _predict(network: nn.Module, data: CalibrationSet, index: Tensor) -> Tensor:
    """Return the predicted noise of some samples, (len(index), C, H, W)."""
    return torch.cat([network(*data.inputs(part)).cpu() for part in torch.split(index, BATCH)])


@dataclass(frozen=True)
class _Path:
    """The state of a sampler's trajectories: x (N, C, H, W), and the x0 of the step before, of the same shape."""

    x: Tensor
    previous: Tensor


@torch.no_grad()
def _tac(
    model: LoadedModel, quantized: nn.Module, seeds: list[int], config: CorrectionConfig, on_step: OnProgress
) -> Correction:
    """Measure the drift of x and the gain of each channel along the trajectories that the corrected network draws.

    Two samplers run side by side from the same noise: one with the float network, one with the corrected quantized one.
    """
    spec = model.spec.sampler
    schedule = model.schedule
    float_network, quantized_network = (
        bind_in_batches(network, model.conditioning, seeds, BATCH) for network in (model.network, quantized)
    )
    place = model.device.place
    start = loop.noise(seeds, 0, model.shape).to(place)  # stream 0, as in `loop.run`
    exact = drawn = _Path(start, torch.zeros_like(start))
    gains = []
    shifts = []
    explained = []
    rows = zip(timesteps(spec, schedule.num_train), samplers.table(schedule, spec), strict=True)
    for step, (t, row) in enumerate(rows):
        t_batch = torch.full((len(seeds),), int(t), device=place)
        # Summed in float64, because differences that nearly cancel have a small mean. (N, C, H, W) -> (C,)
        shift = (drawn.x - exact.x).double().mean((0, 2, 3))
        x = drawn.x - shift.float().reshape(1, -1, 1, 1)
        # Both at the x of the corrected network, so that only the network's own error is measured.
        target = float_network(x, t_batch)
        predicted = quantized_network(x, t_batch)
        gain = channel_gain(predicted, target, relative=config.relative, ridge=config.ridge, floor=config.floor)
        corrected = predicted * gain.float().reshape(1, -1, 1, 1)
        gains.append(tuple(gain.cpu().tolist()))
        shifts.append(tuple(shift.cpu().tolist()))
        explained.append(_explained(target, predicted, corrected))
        # The same for both samplers.
        fresh = loop.noise(seeds, step + 1, model.shape).to(place) if row.fresh else None
        on_exact_path = float_network(exact.x, t_batch)
        exact = _Path(*samplers.update(row, schedule.clip, exact.x, on_exact_path, exact.previous, fresh))
        drawn = _Path(*samplers.update(row, schedule.clip, x, corrected, drawn.previous, fresh))
        on_step(step + 1, spec.steps)
    return Correction(
        rule=CorrectionRule.TAC,
        gain=tuple(gains),
        bias=((0.0,) * model.shape[0],) * spec.steps,
        shift=tuple(shifts),
        variance=(0.0,) * spec.steps,
        explained=tuple(explained),
    )


def _explained(target: Tensor, predicted: Tensor, corrected: Tensor) -> float:
    """Return the share of the squared error of the predicted noise that the correction takes away."""
    before, after = ((epsilon - target).square().sum().double() for epsilon in (predicted, corrected))
    return float(1 - after / before.clamp(min=1e-300))  # an exact network has no error to take away
