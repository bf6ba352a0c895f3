"""From noise to images: DDIM and ancestral sampling as free functions over any `Denoiser`.

In: a denoiser, one random generator per image, a noise schedule and a `SamplerSpec`. Out: images in [-1, 1]. The
state is float32, as the network wants it; the coefficients are float64 and come from `alpha_bar` at the timesteps
actually visited, so uneven spacings need no special case. Each image owns its generator: what it looks like depends
on its seed and never on its batch.

Letters, as in Ho et al. 2020 and Song et al. 2021: `a` and `a_prev` are alpha_bar at this and the next visited
timestep (1 after the last), `x0` the predicted clean image, `epsilon` the predicted noise.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from gaq_export.denoiser import Denoiser
from gaq_export.errors import GaqError
from gaq_export.schedule import NoiseSchedule, SamplerSpec, timesteps

__all__ = ["SAMPLERS", "VARIANCES", "Denoiser", "OnStep", "ddim", "ddpm", "image_generators", "initial_noise", "run"]

OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]
Sampler = Callable[
    [Denoiser, torch.Tensor, NoiseSchedule, SamplerSpec, Sequence[torch.Generator], OnStep | None], torch.Tensor
]


def run(
    denoiser: Denoiser,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    schedule: NoiseSchedule,
    spec: SamplerSpec,
    on_step: OnStep | None = None,
    *,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw one image for each seed.

    Args:
        denoiser: The network, see `Denoiser`.
        seeds: One seed per image.
        shape: (C, H, W) of an image.
        schedule: The noise schedule the network was trained with.
        spec: Which sampler, how many steps.
        on_step: Called before each network call with `step`, `x` and `t`, exactly what the network is about to see.
        device: Where the loop runs. Noise is drawn on the CPU, so images do not depend on it.

    Returns:
        Images in [-1, 1], (N, C, H, W) float32.

    Raises:
        GaqError: If `seeds` is empty, the network returns the wrong shape, or the images are not finite.
    """
    if not seeds:
        raise GaqError("No seeds were given, so there is nothing to draw; give one per image.")
    generators = image_generators(seeds)
    with torch.no_grad():
        x = initial_noise(generators, shape).to(device)
        x = SAMPLERS[spec.name](denoiser, x, schedule, spec, generators, on_step)
    broken = [seed for seed, image in zip(seeds, x, strict=True) if not bool(image.isfinite().all())]
    if broken:
        raise GaqError(
            f"The network produced numbers that are not finite (NaN or infinite) for seeds {broken[:8]}; its weights "
            "or its precision (FP16 overflow) are the usual cause."
        )
    return x.clamp(-1, 1)


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Make one CPU random generator per image.

    Args:
        seeds: One seed per image.
    """
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """Draw standard normal noise, one image from each generator.

    Args:
        generators: One per image; each moves on by one image.
        shape: (C, H, W).

    Returns:
        (N, C, H, W) float32 on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def ddim(
    denoiser: Denoiser,
    x: torch.Tensor,
    schedule: NoiseSchedule,
    spec: SamplerSpec,
    generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Sample with DDIM (Song et al. 2021, equations 12 and 16).

    As in diffusers, clipping `x0` leaves the predicted noise as it was.

    Args:
        denoiser: The network.
        x: Starting noise, (N, C, H, W) float32.
        schedule: The noise schedule the network was trained with.
        spec: Steps, spacing and eta.
        generators: One per image; used only where eta > 0.
        on_step: See `run`.

    Returns:
        Denoised images, the shape of `x`, not clamped.
    """
    for step, t, a, a_prev in _visits(schedule, spec):
        epsilon, x0 = _predict(denoiser, x, step, t, a, schedule.clip, on_step)
        sigma = spec.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x = math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * epsilon
        if sigma > 0:
            x = x + sigma * _fresh_noise(generators, x)
    return x


def ddpm(
    denoiser: Denoiser,
    x: torch.Tensor,
    schedule: NoiseSchedule,
    spec: SamplerSpec,
    generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Sample ancestrally (Ho et al. 2020, equations 6 and 7), with the chain shortened to the visited timesteps.

    Args:
        denoiser: The network.
        x: Starting noise, (N, C, H, W) float32.
        schedule: The noise schedule the network was trained with, its `variance` a key of `VARIANCES`.
        spec: Steps and spacing.
        generators: One per image.
        on_step: See `run`.

    Returns:
        Denoised images, the shape of `x`, not clamped.

    Raises:
        GaqError: If the schedule's variance is not one of `VARIANCES`.
    """
    if schedule.variance not in VARIANCES:
        raise GaqError(
            f"The ddpm sampler needs a variance out of {sorted(VARIANCES)}, but this model's scheduler says "
            f"{schedule.variance!r}. Use the ddim sampler, which needs none."
        )
    for step, t, a, a_prev in _visits(schedule, spec):
        _, x0 = _predict(denoiser, x, step, t, a, schedule.clip, on_step)
        beta = 1 - a / a_prev
        x = (math.sqrt(a_prev) * beta / (1 - a)) * x0 + (math.sqrt(1 - beta) * (1 - a_prev) / (1 - a)) * x
        if a_prev < 1:
            x = x + math.sqrt(VARIANCES[schedule.variance](a, a_prev)) * _fresh_noise(generators, x)
    return x


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm}

# Variance of the noise that ancestral sampling adds: the two bounds of Ho et al. 2020, section 3.2.
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "fixed_small": lambda a, a_prev: (1 - a_prev) / (1 - a) * (1 - a / a_prev),
    "fixed_large": lambda a, a_prev: 1 - a / a_prev,
}


def _visits(schedule: NoiseSchedule, spec: SamplerSpec) -> Iterator[tuple[int, int, float, float]]:
    """Yield step, t, alpha_bar here and alpha_bar at the next visited timestep."""
    visited = timesteps(spec, schedule.num_train)
    alpha_bar = [*schedule.alpha_bar[visited].tolist(), 1.0]
    for step, t in enumerate(visited.tolist()):
        yield step, t, alpha_bar[step], alpha_bar[step + 1]


def _predict(
    denoiser: Denoiser, x: torch.Tensor, step: int, t: int, a: float, clip: float | None, on_step: OnStep | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the network once; return the predicted noise and the clean image it implies."""
    t_batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    if on_step is not None:
        on_step(step, x, t_batch)
    epsilon = denoiser(x, t_batch)
    if epsilon.shape != x.shape:
        raise GaqError(f"The network returned shape {tuple(epsilon.shape)} for images of shape {tuple(x.shape)}.")
    x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
    return epsilon, x0 if clip is None else x0.clamp(-clip, clip)


def _fresh_noise(generators: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    channels, height, width = like.shape[1:]
    return initial_noise(generators, (channels, height, width)).to(like.device)
