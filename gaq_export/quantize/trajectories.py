"""Run the float sampler and keep what the network saw at every step: the calibration set.

Images are drawn in groups of GROUP, the last one filled up, each image from a seed of its own. Since a group's
arithmetic never changes, neither does an image, however many are asked for. A finished group is saved, so that a
killed collection continues; asking for more images later draws only the new ones.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.files import read_safetensors, write_atomically
from calib.seeds import derive_seed
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL, Conditioning
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel

GROUP = 4


def image_seed(seed: int, image: int, purpose: str = "calibration") -> int:
    """Return the seed of image number `image`, another for each purpose; far from the small seeds users sample with."""
    return derive_seed(purpose, seed, image)


def collect(
    model: LoadedModel,
    spec: SamplerSpec,
    *,
    images: int,
    seed: int = 0,
    folder: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Draw `images` trajectories and return the network's inputs, ordered by step, then by image.

    With guidance there are two a step and image, as the network is called: those told nothing before the others.

    Args:
        model: the float model.
        spec: the sampler that it will be used with.
        images: number of trajectories.
        seed: base of the per-image seeds.
        folder: where finished groups are kept; None keeps nothing. Those of other weights, another sampler or seed are
            drawn again.
        on_step: told (steps done, steps in all) over all groups.

    Raises:
        GaqError: `images` is less than 2.
    """
    if images < 2:
        raise GaqError(f"Found {images} calibration images; at least 2 are needed (one of them validates).")
    groups = -(-images // GROUP)
    conditioning = model.conditioning
    facts = f"{model.fingerprint}:{spec!r}:{seed}:{model.shape}:{GROUP}:philox"
    identity = hashlib.sha256(
        f"{facts}{'' if conditioning is None else f':{conditioning.sha256}'}".encode()
    ).hexdigest()
    parts = []
    for g in range(groups):
        path = folder / f"{g:04d}.safetensors" if folder else None
        part = _load(path, identity) if path else None
        if part is None:
            seeds = [image_seed(seed, i) for i in range(g * GROUP, (g + 1) * GROUP)]
            part = _trajectories(model, seeds, spec, partial(_report_step, on_step, g, groups, spec.steps))
            if path:
                write_atomically(path, save({"x": part}, {"identity": identity}))
        parts.append(part)
    x, cond = torch.cat(parts, 1)[:, :images], {}  # (S, N, C, H, W)
    if conditioning is not None:
        rows = conditioning.of([image_seed(seed, i) for i in range(images)])  # (M, ...), M = N, or 2N with guidance
        x = torch.cat((x, x), 1) if conditioning.guided else x
        cond = {name: row.repeat(spec.steps, *(1,) * (row.ndim - 1)) for name, row in rows.items()}
    return CalibrationSet(
        x=x.flatten(0, 1),
        t=timesteps(spec, model.schedule.num_train).repeat_interleave(x.shape[1]),
        step=torch.arange(spec.steps).repeat_interleave(x.shape[1]),
        cond=cond,
    )


def with_step_conditioning(data: CalibrationSet, conditioning: Conditioning | None) -> CalibrationSet:
    """Return what `collect` gave as an engine of steps takes it: with guidance one sample an image, told both."""
    if conditioning is None or not conditioning.guided:
        return data
    steps = len(torch.unique(data.step))

    def half(rows: Tensor, which: int) -> Tensor:  # (S * 2N, ...) -> (S * N, ...)
        return rows.reshape(steps, 2, -1, *rows.shape[1:])[:, which].flatten(0, 1)

    x, t, step = (half(rows, 1) for rows in (data.x, data.t, data.step))
    cond = {name: half(rows, 1) for name, rows in data.cond.items()}
    cond |= {f"{UNCONDITIONAL}{name}": half(rows, 0) for name, rows in data.cond.items()}
    return CalibrationSet(x=x, t=t, step=step, cond=cond | {GUIDANCE: conditioning.scale.expand(len(x))})


def _report_step(on_step: Callable[[int, int], None], group: int, groups: int, steps: int, step: int) -> None:
    on_step(group * steps + step + 1, groups * steps)


def _trajectories(model: LoadedModel, seeds: list[int], spec: SamplerSpec, on_step: Callable[[int], None]) -> Tensor:
    """Return (S, len(seeds), C, H, W): what the network saw at each step."""
    seen = []

    def keep(step: int, x: Tensor, t: Tensor) -> None:
        seen.append(x.clone())
        on_step(step)

    loop.run(model.network, seeds, model.sampling(spec), keep)
    return torch.stack(seen)


def _load(path: Path, identity: str) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        header, tensors = read_safetensors(path)
    except CalibError:
        return None
    return tensors["x"] if header.get("identity") == identity else None
