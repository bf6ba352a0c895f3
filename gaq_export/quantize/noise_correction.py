"""Measure what `calib.correction` takes back: the quantized network beside the float one, on the sampler's own steps.

PTQD sees both on the float network's trajectories. TAC follows the trajectories that the corrected network draws, so
that each step is fitted with those before it already corrected, and knows by how much x has drifted. With guidance it
is the guided noise that is corrected.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calib.choices import CorrectionRule
from calib.config import CorrectionConfig, QuantConfig
from calib.correction import Correction, channel_gain, regress
from calib.data import CalibrationSet
from gaq_export.diffusion import loop, samplers
from gaq_export.diffusion.batching import bind_in_batches
from gaq_export.diffusion.conditioning import Guided
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.trajectories import image_seed, with_step_conditioning

BATCH = 16
OnStep = Callable[[int, int], None]


def measure(
    model: LoadedModel,
    quantized: nn.Module,
    spec: SamplerSpec,
    data: CalibrationSet,
    config: QuantConfig,
    on_step: OnStep = lambda done, total: None,
) -> Correction:
    """Return the correction that the config asks for.

    Args:
        model: the float model.
        quantized: its fake-quantized network.
        spec: the sampler.
        data: what the float network saw at each of its steps.
        config: says which rule.
        on_step: told how many steps are measured, of how many.
    """
    if config.correction.rule is CorrectionRule.PTQD:
        return _ptqd(model, quantized, spec, data, on_step)
    seeds = [image_seed(config.seed, i, "correction") for i in range(config.correction.images)]
    return _tac(model, quantized, spec, seeds, config.correction, on_step)


@torch.no_grad()
def _ptqd(
    model: LoadedModel, quantized: nn.Module, spec: SamplerSpec, data: CalibrationSet, on_step: OnStep
) -> Correction:
    found, data = [], with_step_conditioning(data, model.conditioning)
    guided = model.conditioning is not None and model.conditioning.guided
    networks = [Guided(network) if guided else network for network in (model.network, quantized)]
    for step in range(spec.steps):
        index = (data.step == step).nonzero()[:, 0]
        both = [_predict(network, data, index) for network in networks]
        found.append(regress(both[0], both[1] - both[0]))
        on_step(step + 1, spec.steps)
    channels = model.shape[0]
    return Correction(
        rule=CorrectionRule.PTQD,
        gain=tuple((1 / (1 + f.k),) * channels for f in found),
        bias=tuple(tuple(f.bias.tolist()) for f in found),
        shift=((0.0,) * channels,) * spec.steps,
        variance=tuple((f.sigma / (1 + f.k)) ** 2 for f in found),
        explained=tuple(f.explained for f in found),
    )


@torch.no_grad()
def _tac(
    model: LoadedModel,
    quantized: nn.Module,
    spec: SamplerSpec,
    seeds: list[int],
    config: CorrectionConfig,
    on_step: OnStep,
) -> Correction:
    rows, visited = samplers.table(model.schedule, spec), timesteps(spec, model.schedule.num_train)
    exact = drawn = loop.noise(seeds, 0, model.shape)
    before = [torch.zeros_like(exact)] * 2
    exact_network, quantized_network = (
        bind_in_batches(net, model.conditioning, seeds, BATCH) for net in (model.network, quantized)
    )
    gains, shifts, explained = [], [], []
    for step, row in enumerate(rows):
        shift = (drawn - exact).double().mean((0, 2, 3))
        drawn = drawn - shift.float().reshape(1, -1, 1, 1)
        t = torch.full((len(seeds),), int(visited[step]))
        wanted, given = exact_network(drawn, t), quantized_network(drawn, t)
        gain = channel_gain(given, wanted, relative=config.relative, ridge=config.ridge, floor=config.floor)
        corrected = given * gain.float().reshape(1, -1, 1, 1)
        left, whole = ((part - wanted).square().sum().double() for part in (corrected, given))
        fresh = loop.noise(seeds, step + 1, model.shape) if row.fresh else None
        ahead: list[tuple[Tensor, Tensor]] = [
            samplers.update(row, model.schedule.clip, x, epsilon, previous, fresh)
            for x, epsilon, previous in zip((exact, drawn), (exact_network(exact, t), corrected), before, strict=True)
        ]
        (exact, drawn), before = (ahead[0][0], ahead[1][0]), [ahead[0][1], ahead[1][1]]
        gains.append(tuple(gain.tolist()))
        shifts.append(tuple(shift.tolist()))
        explained.append(float(1 - left / whole.clamp(min=1e-300)))
        on_step(step + 1, spec.steps)
    return Correction(
        rule=CorrectionRule.TAC,
        gain=tuple(gains),
        bias=((0.0,) * model.shape[0],) * spec.steps,
        shift=tuple(shifts),
        variance=(0.0,) * spec.steps,
        explained=tuple(explained),
    )


def _predict(network: nn.Module, data: CalibrationSet, index: Tensor) -> Tensor:
    return torch.cat([network(*data.inputs(part)) for part in torch.split(index, BATCH)])
