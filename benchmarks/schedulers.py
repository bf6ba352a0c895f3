"""Does a model draw what its own scheduler draws? Every scheduler class of diffusers, with its spacings and offsets.

    python benchmarks/schedulers.py --out docs/results/schedulers.md

Classes that are drawn exactly are compared step by step of the same noise, on a formula in place of a network, which
costs nothing. Where another sampler stands in, both are measured on a real network by how close they come to where
infinitely many steps would end. The others are listed with the reason why they are refused.
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers
import torch
import typer
from torch import Tensor

from command import write_markdown
from gaq_export.diffusion.loop import Sampling, noise, run
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.scheduler_classes import CLASSES
from gaq_export.models.scheduler_config import SchedulerReading, read_scheduler
from gaq_export.report.markdown import machine, markdown_table
from options import ModelName, Out

SEEDS = range(8)
SHAPE = (1, 8, 8)
STEPS = (4, 7, 30, 50)  # 7 and 30 do not divide 1000
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("leading", "trailing", "linspace")
ALPHA_BAR: Tensor = diffusers.DDPMScheduler(**LATENT).alphas_cumprod
FEW, MANY = (10, 20, 50), 999  # steps
NOISY = ("SASolverScheduler", "DPMSolverSDEScheduler")


def formula(x: Tensor, t: Tensor) -> Tensor:
    """Return the noise in images of standard deviation 0.5, and something that is not linear."""
    a = ALPHA_BAR[t.long()].view(-1, 1, 1, 1)
    return (1 - a).sqrt() * x / (0.25 * a + 1 - a) + 0.05 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 50)


def theirs(network: Any, scheduler: Any, steps: int, shape: tuple[int, int, int]) -> Tensor:
    """Draw as diffusers' pipelines do, with our noise."""
    scheduler.set_timesteps(steps)
    streams = itertools.count(1)
    module = type(scheduler).__module__
    x: Tensor = noise(SEEDS, 0, shape) * scheduler.init_noise_sigma
    # Most schedulers draw their noise themselves; those without any have nothing to replace.
    draw = mock.Mock(side_effect=lambda *_, **__: noise(SEEDS, next(streams), shape))
    with mock.patch(f"{module}.randn_tensor", draw, create=True):
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            with torch.no_grad():
                x = scheduler.step(network(scaled, t.expand(len(x))), t, x).prev_sample
    return x


def main(model: ModelName = "ddpm-mnist", out: Out = None) -> None:
    """Write the three tables."""
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    exact = list(exact_rows())
    worst = max(float(row[-1]) for row in exact)
    print(f"largest difference: {worst:.1e}", flush=True)
    stand_ins = list(stand_in_rows(load_model(model)))
    write_markdown(
        [
            f"{machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}. Images of seeds {SEEDS[0]} to "
            f"{SEEDS[-1]}.",
            "",
            "## Drawn as the scheduler draws",
            "",
            f"Largest difference of any pixel to diffusers over {', '.join(map(str, STEPS))} steps, with clipping and",
            "without where the class has it. Images of magnitude 1; float32 is good for about 1e-6. DDPM's rows are",
            "those of `--sampler ddpm`.",
            "",
            *markdown_table(("class", "spacing", "offset", "last alpha", "ours", "largest difference"), exact),
            "",
            "Not the same: with `fixed_large`, an offset or trailing steps, diffusers' DDPM adds noise to the finished",
            "image, and ours does not (Ho et al. 2020, algorithm 2).",
            "",
            "## Another sampler stands in",
            "",
            f"`{model}` without clipping, over {', '.join(map(str, FEW))} steps: mean PSNR in dB, of diffusers'",
            f"scheduler and of what stands in, against the limit of many steps ({MANY} of `dpmpp-2m`). Samplers that",
            "add noise have no such limit. Heun and KDPM2 call the network twice a step.",
            "",
            *markdown_table(("class", "ours", "its dB", "our dB"), stand_ins),
            "",
            "## Refused",
            "",
            *markdown_table(
                ("class", "why"), [(f"`{n}`", kind.refused) for n, kind in sorted(CLASSES.items()) if kind.refused]
            ),
        ],
        out,
    )


def exact_rows() -> Iterator[tuple[str, ...]]:
    """Compare every class that is drawn exactly, and DDPM with its own sampler."""
    for name, kind in CLASSES.items():
        own = "ddpm" if name.startswith("DDPM") else kind.sampler
        own = kind.leading or own
        if kind.refused or (kind.instead and not kind.leading and own != "ddpm"):
            continue
        lasts = (True, False) if name.startswith("DDIM") else (None,)
        for spacing, offset, last in itertools.product(SPACINGS[: 1 if kind.leading else 3], (0, 1, 3), lasts):
            settings = LATENT | {"timestep_spacing": spacing, "steps_offset": offset}
            settings |= {} if last is None else {"set_alpha_to_one": last}
            clips = [{"clip_sample": clip} for clip in (True, False)] if name.startswith("DD") else [{}]
            difference = max(_difference(name, own, settings | clip, steps) for clip in clips for steps in STEPS)
            end = {None: "", True: "1", False: "that of t = 0"}[last]
            spread = read_scheduler({"_class_name": name} | settings).sampler.spacing
            eta = f", eta {kind.eta:g}" if kind.eta else ""
            yield f"`{name}`", spacing, str(offset), end, f"{own}, {spread}{eta}", f"{difference:.1e}"


def _difference(name: str, own: str, settings: Mapping[str, Any], steps: int) -> float:
    reading = read_scheduler({"_class_name": name, **settings})
    drawn = theirs(formula, getattr(diffusers, name)(**settings), steps, SHAPE)
    spec = SamplerSpec(name=own, steps=steps, spacing=reading.sampler.spacing, eta=reading.sampler.eta)
    ours = run(formula, SEEDS, Sampling(schedule=reading.schedule, shape=SHAPE, sampler=spec))
    drawn = drawn if reading.schedule.clip is None else drawn.clamp(-1, 1)  # as our loop ends
    return float((ours - drawn).abs().max())


def stand_in_rows(loaded: LoadedModel) -> Iterator[tuple[str, ...]]:
    """Draw with each class that something stands in for, and with what does."""
    betas = {name: loaded.spec.scheduler[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    karras = {"use_karras_sigmas": True}
    cases: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name, kind in CLASSES.items() if kind.instead and not name.startswith("DDPM")),
        ("DPMSolverMultistepScheduler", karras),
        ("EulerDiscreteScheduler", karras),
    ]
    limit = None
    for name, further in cases:
        reading = read_scheduler({"_class_name": name} | betas | further)
        asked = f"`{name}`" + "".join(f", `{key}`" for key in further)
        spec = reading.sampler
        figures = ["", ""]
        if not spec.eta and name not in NOISY:
            if limit is None:
                limit = _ours(loaded, reading, SamplerSpec(name="dpmpp-2m", steps=MANY))
            reference = getattr(diffusers, name)(**betas, **further)
            drawn = [theirs(loaded.network, reference, steps, loaded.shape) for steps in FEW]
            ours = [_ours(loaded, reading, replace(spec, steps=steps)) for steps in FEW]
            figures = [", ".join(f"{float(psnr(x, limit).mean()):.1f}" for x in images) for images in (drawn, ours)]
        print(name, *further, *figures, flush=True)
        eta = f", eta {spec.eta:g}" if spec.eta else ""
        yield asked, f"{spec.name}, {spec.spacing}{eta}", *figures


def _ours(loaded: LoadedModel, reading: SchedulerReading, spec: SamplerSpec) -> Tensor:
    """Draw without clipping, as these classes do."""
    schedule = replace(reading.schedule, clip=None)
    return run(loaded.network, SEEDS, Sampling(schedule=schedule, shape=loaded.shape, sampler=spec))


if __name__ == "__main__":
    typer.run(main)
