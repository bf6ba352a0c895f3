"""From noise to images: one loop over any network, for every sampler.

In: a network, one seed per image, and a `Sampling`. Out: images in [-1, 1]. The state is float32, the type
that networks take. An image's noise depends on its seed and not on its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.correction import Correction
from calib.devices import reproducible
from engines import philox
from gaq_export.devices import ON_HOST, Device
from gaq_export.diffusion.conditioning import ConditionalNetwork, Conditioning, bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.diffusion.samplers import table, update
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, timesteps
from gaq_export.errors import GaqError

OnStep = Callable[[int, Tensor, Tensor], None]
Decode = Callable[[Tensor], Tensor]  # latents (N, C, h, w) -> images (N, C, H, W)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """How images are drawn, whatever predicts the noise: a PyTorch network, or an engine.

    Attributes:
        schedule: the noise schedule that the network was trained with.
        shape: (C, H, W) of what the loop denoises.
        sampler: which sampler, how many steps.
        conditioning: what to draw; None for an unconditional network.
        correction: of the predicted noise, if it comes from a quantized network.
        decode: turns the loop's result into images, if the result is latents.
        device: where the loop runs; noise is drawn on the host, and images come back to it.
    """

    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    sampler: SamplerSpec
    conditioning: Conditioning | None = None
    correction: Correction | None = None
    decode: Decode | None = None
    device: Device = ON_HOST


def run(
    network: ConditionalNetwork,
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: OnStep | None = None,
    *,
    apart: bool = False,
) -> Tensor:
    """Draw one image for each seed.

    Args:
        network: called as (x, t), or as (x, t, cond) where `sampling` has conditioning.
        seeds: one per image.
        sampling: how to draw.
        on_step: called before each network call with `step`, `x` and `t`, the inputs of that call.
        apart: whether guidance calls the network twice rather than with a batch of twice the size, see `Guided`.

    Returns:
        Images in [-1, 1], or what `finish` says, (N, C, H, W) float32, on the host.

    Raises:
        GaqError: `seeds` is empty, the network returns the wrong shape, or the images are not finite.
    """
    spec = sampling.sampler
    schedule = sampling.schedule
    denoiser = bind(network, sampling.conditioning, seeds, apart=apart)
    rows = table(schedule, spec, sampling.correction)
    x = noise(seeds, 0, sampling.shape).to(sampling.device.place)
    previous = torch.zeros_like(x)  # no sampler reads it at the first step
    with torch.no_grad(), reproducible(sampling.device.place, tf32=sampling.device.tf32):
        for step, (t, row) in enumerate(zip(timesteps(spec, schedule.num_train), rows, strict=True)):
            # (N,) int64, all alike: networks take a timestep for each image.
            t_batch = torch.full((len(x),), int(t), dtype=torch.int64, device=x.device)
            if on_step is not None:  # before the call, since what the network sees is what calibration collects
                on_step(step, x, t_batch)
            epsilon = _predict(denoiser, x, t_batch)
            # Stream 0 was the start, so step i draws from stream i + 1.
            fresh = noise(seeds, step + 1, sampling.shape).to(x.device) if row.fresh else None
            x, previous = update(row, schedule.clip, x, epsilon, previous, fresh)
        return finish(seeds, x, sampling)


def _predict(denoiser: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    epsilon = denoiser(x, t)
    if epsilon.shape != x.shape:  # it might broadcast, and the error would show only in the images
        raise GaqError(f"The network returned shape {tuple(epsilon.shape)} for images of {tuple(x.shape)}.")
    return epsilon


def noise(seeds: Sequence[int], stream: int, shape: tuple[int, int, int]) -> Tensor:
    """Return (N, C, H, W) standard normal noise: what the loop starts from (stream 0), what step i adds (i + 1).

    Raises:
        GaqError: there are no seeds.
    """
    if not seeds:
        raise GaqError("No seeds were given, so there is nothing to draw; give one per image.")
    return torch.from_numpy(philox.normals(seeds, stream, shape))


def finish(seeds: Sequence[int], x: Tensor, sampling: Sampling) -> Tensor:
    """Return the images of a finished loop, clamped to [-1, 1].

    Where a model has neither a decoder nor a clipping range, `x` may be latents, and is returned as it is.

    Args:
        seeds: one per image.
        x: what the loop ended with, (N, C, H, W).
        sampling: how it was drawn.

    Raises:
        GaqError: some of the images are not finite.
    """
    finite = x.isfinite().flatten(1).all(1).cpu().tolist()  # (N, C, H, W) -> (N,)
    broken = [seed for seed, whole in zip(seeds, finite, strict=True) if not whole]
    if broken:
        raise GaqError(
            f"The network produced numbers that are not finite (NaN or infinite) for seeds {broken[:8]}; its weights, "
            "its precision (FP16 overflow) or a timestep that it has no value for (--spacing from-1 leaves out 0) are "
            "the usual causes."
        )
    if sampling.decode is None and sampling.schedule.clip is None:
        return x.cpu()  # latents have no bounds, and clamping would damage them
    return (x if sampling.decode is None else sampling.decode(x)).clamp(-1, 1).cpu()
