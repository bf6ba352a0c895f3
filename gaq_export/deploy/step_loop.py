"""Draw with an engine of whole denoising steps (`gaq_export.graph.step`), or get just the predicted noise from it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib.data import NO_CONDITION
from engines import Engine, Loop
from gaq_export.diffusion import loop
from gaq_export.diffusion.loop import Sampling
from gaq_export.errors import GaqError
from gaq_export.graph.step import FEEDBACK


def run(
    engine: Engine,
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Draw one image for each seed, as `loop.run` does, the whole loop inside the engine.

    Args:
        engine: one that computes whole steps.
        seeds: one per image.
        sampling: how to draw; its sampler has to be the one that the engine was built for.
        on_step: called with the number of each step.

    Returns:
        Images in [-1, 1], or what `loop.finish` says, (N, C, H, W) float32.

    Raises:
        GaqError: no seeds, or images that are not finite.
    """
    # `previous`, the x0 of the step before, has factor 0 at the first step.
    x = loop.noise(seeds, 0, sampling.shape).numpy()
    feeds = {"x": x, "step": np.zeros(1, np.int64), "previous": np.zeros_like(x)}
    if sampling.conditioning is not None:
        feeds |= {name: tensor.numpy() for name, tensor in sampling.conditioning.feeds(seeds).items()}
    input_names = {spec.name for spec in engine.inputs}
    output_names = {spec.name for spec in engine.outputs}
    iterations = Loop(
        count=sampling.sampler.steps,
        # DDIM's engines have no `clean` output, since DDIM does not look back; those without fresh noise no `noise`.
        feedback={output: name for output, name in FEEDBACK.items() if output in output_names},
        noise={"noise": seeds} if "noise" in input_names else {},
        on_step=on_step,
    )
    outputs = engine.loop(as_taken(engine, feeds, len(x)), iterations)
    return loop.finish(seeds, torch.from_numpy(outputs["x_next"]), sampling)


def as_taken(engine: Engine, feeds: Mapping[str, npt.NDArray[Any]], batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return those of `feeds` that the engine takes; a value for all images, (1,), is repeated where it takes rows."""
    # `step` and `guidance` are (1,) in most engines, and (N,) in those with a step for each image.
    specs = {spec.name: spec for spec in engine.inputs if spec.name in feeds}
    single = {name for name in specs if feeds[name].shape == (1,)}
    return {n: np.resize(feeds[n], s.at_batch(batch)) if n in single else feeds[n] for n, s in specs.items()}


def step_denoiser(engine: Engine, visited: Tensor) -> Callable[..., Tensor]:
    """Make the engine callable as (x, t), or (x, t, cond), at the timesteps of its steps.

    Args:
        engine: one that computes whole steps; the caller closes it.
        visited: (S,) timesteps of its steps.
    """

    def denoise(x: Tensor, t: Tensor, condition: Mapping[str, Tensor] = NO_CONDITION, /) -> Tensor:
        device = x.device
        x, t = x.cpu(), t.cpu()  # an engine takes arrays on the host
        step = (visited == t[0]).nonzero()[:1, 0]
        if len(step) == 0 or bool((t != t[0]).any()):
            raise GaqError(f"This engine takes the timesteps {visited.tolist()}, one at a time; found {t.tolist()}.")
        # The noise and the previous x0 do not change the predicted noise: zeros stand in for them.
        blank = {spec.name: np.zeros(spec.at_batch(len(x)), np.float32) for spec in engine.inputs}
        rows = {n: tensor[: blank[n].shape[0]].cpu().numpy() for n, tensor in condition.items() if n in blank}
        feeds = as_taken(engine, {**blank, **rows, "x": x.numpy(), "step": step.numpy()}, len(x))
        return torch.from_numpy(engine(feeds)["eps"]).to(device)

    return denoise
