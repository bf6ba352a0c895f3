"""How close is the predicted noise? Two denoisers on the same inputs, compared at every step of a sampler.

In: the float denoiser, quantized ones, a sampler and seeds. Out: SQNR in dB, or squared errors, one value a step.

One of the denoisers leads: its predictions drive the sampler, and the others see what it sees. Along a trajectory led
by the float network, the errors of earlier steps do not add up, so that each step is measured by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from calib.sqnr import sqnr_db
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import timesteps
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import provenance_of
from gaq_export.quantize.float_engine import network_group
from gaq_export.quantize.trajectories import image_seed

OnStage = Callable[[str, int, int], None]  # called with (what is being done, done, total)
Visit = Callable[[Tensor, Tensor, Tensor], None]  # called with x, t and the leader's predicted noise
FLOAT, QUANTIZED = "float trajectory", "quantized trajectory"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """What a denoiser saw and predicted at each of S steps, for N images.

    Attributes:
        x: noisy images, (S, N, C, H, W).
        t: timesteps, (S, N) int64.
        epsilon: predicted noise, (S, N, C, H, W).
    """

    x: Tensor
    t: Tensor
    epsilon: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSqnr:
    """SQNR in dB of a plan's predicted noise against the float network's, for S steps and N images.

    Attributes:
        t: timestep of each step, (S,).
        weights: with float activations, (S, N).
        both: with quantized activations too, (S, N).
    """

    t: Tensor
    weights: Tensor
    both: Tensor


def follow(leader: Denoiser, seeds: Sequence[int], sampling: Sampling, visit: Visit) -> Tensor:
    """Run a sampler, call `visit` with what the leader saw and predicted at each step, and return the images.

    Args:
        leader: the denoiser whose predictions the sampler takes.
        seeds: one per image.
        sampling: how to draw; its conditioning is not used, since the leader is bound to one already.
        visit: called with `x` and `epsilon` (N, C, H, W) and `t` (N,).
    """

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        epsilon = leader(x, t)
        visit(x, t, epsilon)
        return epsilon

    return loop.run(denoise, seeds, replace(sampling, conditioning=None))


def record(leader: Denoiser, seeds: Sequence[int], sampling: Sampling) -> Trajectory:
    """Return the whole trajectory of a denoiser, on the host; arguments as for `follow`."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    follow(leader, seeds, sampling, lambda *step: steps.append(step))
    x, t, epsilon = (torch.stack(part).cpu() for part in zip(*steps, strict=True))  # S x (N, ...) -> (S, N, ...)
    return Trajectory(x=x, t=t, epsilon=epsilon)


def squared_errors(trajectory: Trajectory, denoiser: Denoiser, correction: Correction | None = None) -> list[float]:
    """Return |epsilon_hat - epsilon|^2 at each step, summed over all images of a recorded trajectory.

    Args:
        trajectory: of the float denoiser.
        denoiser: predicts epsilon_hat.
        correction: of its noise, applied before the comparison as the sampler would.
    """
    errors = []
    with torch.no_grad():
        for step, (x, t, exact) in enumerate(zip(trajectory.x, trajectory.t, trajectory.epsilon, strict=True)):
            predicted = corrected(denoiser(x, t).double(), correction, step)  # the sum is over all pixels of all images
            errors.append(float((predicted - exact.double()).square().sum()))
    return errors


def corrected(epsilon: Tensor, correction: Correction | None, step: int) -> Tensor:
    """Return predicted noise (N, C, H, W) as the sampler takes it at a step."""
    if correction is None:
        return epsilon
    # (C,) -> (C, 1, 1), so that it spreads over (N, C, H, W)
    gain = torch.tensor(correction.gain[step]).to(epsilon.device)[:, None, None]
    bias = torch.tensor(correction.bias[step]).to(epsilon.device)[:, None, None]
    return gain * (epsilon - bias)


def along_both(
    quantized: Denoiser, exact: Denoiser, seeds: Sequence[int], sampling: Sampling
) -> dict[str, list[float]]:
    """Return the SQNR in dB at each step, over all images together, along the trajectories of both denoisers.

    Args:
        quantized: a quantized network, or an engine.
        exact: the float network.
        seeds: one per image.
        sampling: as for `follow`.

    Returns:
        A value per step by the trajectory's name, FLOAT or QUANTIZED.
    """
    rows: dict[str, list[float]] = {FLOAT: [], QUANTIZED: []}

    def visit_float(x: Tensor, t: Tensor, epsilon: Tensor) -> None:
        rows[FLOAT].append(sqnr_db(epsilon, quantized(x, t)))

    def visit_quantized(x: Tensor, t: Tensor, epsilon: Tensor) -> None:
        rows[QUANTIZED].append(sqnr_db(exact(x, t), epsilon))  # the float network is the signal, whichever leads

    follow(exact, seeds, sampling, visit_float)
    follow(quantized, seeds, sampling, visit_quantized)
    return rows


def of_plan(model: LoadedModel, plan: QuantPlan, images: int, on_step: OnStage) -> NoiseSqnr:
    """Compare a plan with its float model, image by image, on trajectories that calibration did not see.

    The float network leads. With guidance it is the guided noise that is compared.

    Args:
        model: the float model.
        plan: made from it.
        images: trajectories to draw.
        on_step: called with (what is being done, steps done, steps in all).
    """
    spec = provenance_of(plan).sampler
    quantized = [fake_quantized(model.network, plan, activations=rounded) for rounded in (False, True)]
    # Hashed under a purpose, "inspection", so these are never the seeds of calibration images.
    seeds = [image_seed(plan.config.seed, i, "inspection") for i in range(images)]
    size = network_group(model)
    groups = [seeds[start : start + size] for start in range(0, images, size)]
    rows: list[list[list[float]]] = []  # one entry a network call: 2 networks x images of the group

    for group in groups:
        exact, *others = (bind(network, model.conditioning, group) for network in (model.network, *quantized))

        # A default binds this group's denoisers to the function.
        def visit(x: Tensor, t: Tensor, epsilon: Tensor, others: Sequence[Denoiser] = others) -> None:
            rows.append([[sqnr_db(e, o) for e, o in zip(epsilon, net(x, t), strict=True)] for net in others])
            on_step("following fresh trajectories, step", len(rows), len(groups) * spec.steps)

        follow(exact, group, model.sampling(spec), visit)
    parts = [torch.tensor(rows[i * spec.steps : (i + 1) * spec.steps]) for i in range(len(groups))]  # (S, 2, n) each
    weights, both = torch.cat(parts, 2).unbind(1)  # (S, 2, N) -> 2 x (S, N)
    return NoiseSqnr(t=timesteps(spec, model.schedule.num_train), weights=weights, both=both)
