"""Run the float sampler and collect what the network saw at every step: the calibration set.

In: a model, a sampler, a number of images. Out: a `CalibrationSet` of their trajectories.

Images are drawn in full groups, each image from its own seed. A group's arithmetic is always the same, so an image does
not depend on how many are collected. Each finished group is saved: an interrupted collection continues, and if more
images are needed later, only the new groups are drawn.
"""

import hashlib
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.files import read_kept, write_checked
from calib.seeds import derive_seed
from engines import EngineError
from gaq_export.diffusion import loop
from gaq_export.diffusion.batching import OnProgress
from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL, ConditionalNetwork, Conditioning
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.float_engine import Drawer, drawers

_log = logging.getLogger(__name__)


def image_seed(seed: int, image: int, purpose: str = "calibration") -> int:
    """Return the seed of an image, different for each purpose, and far from the small seeds that users sample with."""
    return derive_seed(purpose, seed, image)


def collect(
    model: LoadedModel,
    spec: SamplerSpec,
    *,
    images: int,
    seed: int = 0,
    folder: Path | None = None,
    by_engine: bool = True,
    on_step: OnProgress = lambda done, total: None,
) -> CalibrationSet:
    """Draw trajectories and return the network's inputs, ordered by step, then by image.

    With guidance there are two samples for each step and image, as the network is called: the unconditional ones of all
    images, then the conditional ones.

    Args:
        model: The float model.
        spec: The sampler that it will be used with.
        images: Number of trajectories.
        seed: Base of the per-image seeds.
        folder: Where finished groups are saved; None saves none. Groups of other weights, another sampler or another
            seed are drawn again.
        by_engine: Whether an engine may draw in the network's place, where it is faster (`float_engine`).
        on_step: Called with (steps done, total) over all groups.

    Raises:
        GaqError: `images` is less than 2.
    """
    if images < 2:
        raise GaqError(f"Found {images} calibration images; at least 2 are needed (one of them validates).")
    choice = drawers(model, spec, by_engine=by_engine)
    for drawer in choice:
        count = -(-images // drawer.group)  # rounded up
        groups = _Groups(model=model, spec=spec, seed=seed, drawer=drawer, count=count)
        try:
            parts = _draw(groups, folder, on_step)
        except (EngineError, GaqError) as error:
            if drawer is choice[-1]:
                raise
            _log.warning("PyTorch draws the calibration images, since no engine of the float network can: %s", error)
            continue
        x = torch.cat(parts, 1)[:, :images]  # (S, N, C, H, W)
        return _calibration_set(model, spec, x, [image_seed(seed, image) for image in range(images)])
    raise AssertionError("the last drawer either draws or raises")


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The groups of a collection: who draws them, and from what."""

    model: LoadedModel
    spec: SamplerSpec
    seed: int
    drawer: Drawer
    count: int


def _draw(groups: _Groups, folder: Path | None, on_step: OnProgress) -> list[Tensor]:
    """Return the trajectories (S, n, C, H, W) of every group, read from the folder if they are there."""
    model, spec, size = groups.model, groups.spec, groups.drawer.group
    identity = _identity(groups)
    parts = []
    with ExitStack() as stack:
        network = None
        for group in range(groups.count):
            path = folder / f"{group:04d}.safetensors" if folder else None
            part = _load(path, identity, (spec.steps, size, *model.shape)) if path else None
            if part is None:
                network = network or stack.enter_context(groups.drawer.open(model))
                # All images of the group, also those of the last one that are not needed yet.
                seeds = [image_seed(groups.seed, image) for image in range(group * size, (group + 1) * size)]
                report = _part_of(on_step, group * spec.steps, groups.count * spec.steps)
                part = _trajectories(network, seeds, model.sampling(spec), report)
                if path:
                    write_checked(
                        path, {"x": part}, {"identity": identity, "drawn_by": groups.drawer.name or "PyTorch"}
                    )
            parts.append(part)
    return parts


def _identity(groups: _Groups) -> str:
    """Return a sha256 of all that trajectories depend on."""
    model, drawer = groups.model, groups.drawer
    # "philox" names the generator of the noise, on which trajectories depend too.
    facts = f"{model.fingerprint}:{groups.spec!r}:{groups.seed}:{model.shape}:{drawer.group}:philox"
    if drawer.name:
        facts += f":{drawer.name}"
    if model.conditioning is not None:
        facts += f":{model.conditioning.sha256}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _calibration_set(model: LoadedModel, spec: SamplerSpec, x: Tensor, seeds: list[int]) -> CalibrationSet:
    """Return trajectories x (S, N, C, H, W) of N seeds as samples, with the condition of each."""
    cond = {}
    if model.conditioning is not None:
        x = torch.cat((x, x), 1) if model.guided else x  # (S, 2N, C, H, W): both halves see the same x
        rows = model.conditioning.of(seeds)  # (N, ...), or (2N, ...) with guidance
        # (M, ...) -> (S * M, ...), the same rows at every step
        cond = {name: row.repeat(spec.steps, *(1,) * (row.ndim - 1)) for name, row in rows.items()}
    samples = x.shape[1]  # of a step
    return CalibrationSet(
        x=x.flatten(0, 1),
        t=timesteps(spec, model.schedule.num_train).repeat_interleave(samples),
        step=torch.arange(spec.steps).repeat_interleave(samples),
        cond=cond,
        device=model.device.place,
    )


def with_step_conditioning(data: CalibrationSet, conditioning: Conditioning | None) -> CalibrationSet:
    """Return a calibration set as an engine of whole steps takes it.

    Args:
        data: From `collect`. With guidance, half of its samples are unconditional.
        conditioning: Of the same model.

    Returns:
        With guidance, one sample for each step and image, with both conditions and the scale; else `data`.
    """
    if conditioning is None or not conditioning.guided:
        return data
    steps = len(torch.unique(data.step))

    # A step's samples are the unconditional half, then the conditional half, see `_calibration_set`.
    def half(rows: Tensor, which: int) -> Tensor:  # (S * 2N, ...) -> (S * N, ...)
        return rows.reshape(steps, 2, -1, *rows.shape[1:])[:, which].flatten(0, 1)

    # Both halves have the same x, t and step.
    x, t, step = (half(rows, 1) for rows in (data.x, data.t, data.step))
    cond = {name: half(rows, 1) for name, rows in data.cond.items()}
    cond |= {f"{UNCONDITIONAL}{name}": half(rows, 0) for name, rows in data.cond.items()}
    cond |= {GUIDANCE: conditioning.scale.expand(len(x))}
    return replace(data, x=x, t=t, step=step, cond=cond)


def _part_of(on_step: OnProgress, before: int, total: int) -> OnProgress:
    """Return a callback for one part of the work, which begins after `before` steps of `total`."""
    return lambda done, _: on_step(before + done, total)


def _trajectories(network: ConditionalNetwork, seeds: list[int], sampling: Sampling, on_step: OnProgress) -> Tensor:
    """Return (S, len(seeds), C, H, W): what the network saw at each step."""
    seen = []

    def keep(step: int, x: Tensor, t: Tensor) -> None:
        seen.append(x.cpu().clone())
        on_step(step + 1, sampling.sampler.steps)

    loop.run(network, seeds, sampling, keep)
    return torch.stack(seen)


def _load(path: Path, identity: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return the trajectories (S, n, C, H, W) of a saved group; None if they have to be drawn (again)."""

    def parse(header: dict[str, str], tensors: dict[str, Tensor]) -> Tensor | None:
        if header.get("identity") != identity:
            return None
        x = tensors.get("x")
        if x is None or x.shape != shape or x.dtype != torch.float32:
            raise CalibError(f"{path} does not hold float32 trajectories of shape {shape}.")
        return x

    return read_kept(path, parse)
