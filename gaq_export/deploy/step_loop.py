"""Draw with an engine that holds whole denoising steps (`gaq_export.graph.step`), or ask it for the noise alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib.data import NO_CONDITION
from engines import Engine, Loop
from gaq_export.diffusion import samplers
from gaq_export.diffusion.denoiser import Condition
from gaq_export.errors import GaqError
from gaq_export.graph.step import FEEDBACK


def run(
    engine: Engine,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
    condition: Mapping[str, Tensor] = NO_CONDITION,
    decode: samplers.Decode | None = None,
    clip: float | None = 1.0,
) -> Tensor:
    """Draw one image for each seed, as `samplers.run` does, the whole loop inside the engine.

    Args:
        engine: one that holds steps.
        seeds: one per image.
        shape: (C, H, W) of an image.
        steps: how many the engine has.
        on_step: told the number of each.
        condition: what the network is told, by the names of the engine's inputs.
        decode: makes images of what the loop ends with, if that is latents.
        clip: the schedule's, see `samplers.finish`.

    Returns:
        Images in [-1, 1], or what `samplers.finish` says, (N, C, H, W) float32.

    Raises:
        GaqError: no seeds, or images that are not finite.
    """
    x = samplers.noise(seeds, 0, shape).numpy()
    feeds = {"x": x, "step": np.zeros(1, np.int64), "previous": np.zeros_like(x)}
    feeds |= {name: tensor.numpy() for name, tensor in condition.items()}
    taken, given = {spec.name for spec in engine.inputs}, {spec.name for spec in engine.outputs}
    loop = Loop(
        count=steps,
        feedback={output: name for output, name in FEEDBACK.items() if output in given},
        noise={"noise": seeds} if "noise" in taken else {},
        on_step=on_step,
    )
    outputs = engine.loop(as_taken(engine, feeds, len(x)), loop)
    return samplers.finish(seeds, torch.from_numpy(outputs["x_next"]), decode, clip=clip)


def as_taken(engine: Engine, feeds: Mapping[str, npt.NDArray[Any]], batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return those of `feeds` that the engine takes; what is one for all, (1,), for each image where it has rows."""
    specs = {spec.name: spec for spec in engine.inputs if spec.name in feeds}
    single = {name for name in specs if feeds[name].shape == (1,)}
    return {n: np.resize(feeds[n], s.at_batch(batch)) if n in single else feeds[n] for n, s in specs.items()}


def step_denoiser(engine: Engine, visited: Tensor) -> Callable[..., Tensor]:
    """Make the engine callable as (x, t), or (x, t, told), at the timesteps it knows.

    Args:
        engine: one that holds steps; the caller keeps it open and closes it.
        visited: (S,) timesteps of its steps.
    """

    def denoise(x: Tensor, t: Tensor, condition: Mapping[str, Tensor] = NO_CONDITION, /) -> Tensor:
        step = (visited == t[0]).nonzero()[:1, 0]
        if len(step) == 0 or bool((t != t[0]).any()):
            raise GaqError(f"This engine knows the timesteps {visited.tolist()}, one at a time; found {t.tolist()}.")
        blank = {spec.name: np.zeros(spec.at_batch(len(x)), np.float32) for spec in engine.inputs}
        given = {name: tensor[: blank[name].shape[0]].numpy() for name, tensor in condition.items() if name in blank}
        feeds = as_taken(engine, {**blank, **given, "x": x.numpy(), "step": step.numpy()}, len(x))
        return torch.from_numpy(engine(feeds)["eps"])

    return denoise


def engine_denoiser(engine: Engine) -> Callable[..., Tensor]:
    """Make an open engine callable as `(x, t)`, or `(x, t, cond)`.

    Args:
        engine: takes `x`, `t` and what it is told by name, gives `eps`; the caller keeps it open and closes it.
    """

    def denoise(x: Tensor, t: Tensor, cond: Condition | None = None, /) -> Tensor:
        condition = {name: tensor.numpy() for name, tensor in (cond or {}).items()}
        return torch.from_numpy(engine({"x": x.numpy(), "t": t.numpy(), **condition})["eps"])

    return denoise
