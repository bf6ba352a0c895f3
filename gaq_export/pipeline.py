"""The whole way: one function for each command, from the module that does it.

    calibrate     float model       -> QuantPlan in a run folder
    build_engine  run folder        -> Q/DQ ONNX -> engine, audited and checked against PyTorch
    sample        engine            -> images, or files of many with `sample_shards`
    inspect       run folder        -> a page about its calibration

A model is a `LoadedModel`: `load_model` makes one from a name or a folder, `wrap` from any module that is called as
(x, t). Users find all of this, and the types beside it, in `gaq_export` itself.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from calib import config as configs
from calib.plan import QuantPlan, load_plan, save_plan
from calib.progress import Progress
from gaq_export import run as runs
from gaq_export.deploy.build import Built, build_engine
from gaq_export.deploy.onnx_artifact import export_onnx
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel, load_model, wrap
from gaq_export.models.provenance import Provenance, provenance_of
from gaq_export.quantize import latency
from gaq_export.quantize.presets import Preset, preset
from gaq_export.quantize.quantize import learn
from gaq_export.quantize.trajectories import collect
from gaq_export.report.inspect import inspect
from gaq_export.run import Run
from gaq_export.sampling import prompts
from gaq_export.sampling.png_folder import Sampled
from gaq_export.sampling.sample import sample, sample_shards

__all__ = [
    "Built",
    "LoadedModel",
    "Sampled",
    "build_engine",
    "calibrate",
    "export_onnx",
    "inspect",
    "load_model",
    "preset",
    "sample",
    "sample_shards",
    "wrap",
]


def calibrate(
    model: LoadedModel,
    chosen: Preset,
    *,
    folder: str | Path = runs.DEFAULT,
    sampler: SamplerSpec | None = None,
    on_collect: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_correct: Callable[[int, int], None] = lambda done, total: None,
) -> QuantPlan:
    """Quantize `model`, keeping everything in the run folder; the same call again continues or returns the result.

    Args:
        model: what to quantize; one that is told classes, and not which, is told all.
        chosen: schedule and bits, from `preset`.
        folder: run folder.
        sampler: sampler the calibration follows; the model's own if None.
        on_collect: told (network calls done, in all) while trajectories are drawn.
        on_progress: told after every iteration and block.
        on_correct: told (sampling steps done, in all) while something is measured along the sampler, if anything is.

    Raises:
        GaqError, CalibError: bad settings, a folder that holds another run, or one that cannot be written.
    """
    run, model = Run(folder=Path(folder)), prompts.condition_model(model)
    spec = sampler or model.spec.sampler
    provenance = Provenance.of(model, spec)
    settings = {"model": provenance.model_record, "sampler": spec.to_json(), "images": chosen.images}
    if model.conditioning is not None:
        conditioning = model.conditioning
        settings |= {
            "conditioning": list(conditioning.names),
            "guidance": conditioning.guidance,
            "tables_sha256": conditioning.sha256,
        }
    runs.claim(run, settings | {"config": json.loads(json.dumps(configs.to_json(chosen.config)))})
    if run.plan.exists():
        return load_plan(run.plan)
    if model.conditioning is not None:
        model.conditioning.save(run.folder)
    started = time.perf_counter()
    seed = chosen.config.seed
    data = collect(model, spec, images=chosen.images, seed=seed, folder=run.calibration, on_step=on_collect)
    collected = time.perf_counter()
    phases: dict[str, float] = {}

    def keep(progress: Progress) -> None:
        phases.update(progress.seconds)
        on_progress(progress)

    plan = learn(
        model,
        data,
        chosen.config,
        spec,
        about=provenance.to_json(),
        folder=run.blocks,
        clock=partial(latency.step_times, model, kept=run.times),
        on_progress=keep,
        on_step=on_correct,
    )
    save_plan(plan, run.plan)
    runs.add_entry(
        run,
        "calibrate",
        collect_seconds=round(collected - started, 1),
        seconds=round(time.perf_counter() - collected, 1),
        phase_seconds={name: round(seconds, 1) for name, seconds in phases.items()},
        peak_memory_mib=runs.peak_memory_mib(),
    )
    return plan


def sampler_of(folder: str | Path = runs.DEFAULT) -> SamplerSpec:
    """Return the sampler that the calibration in the run folder followed; raise CalibError if there is none."""
    return provenance_of(load_plan(Run(folder=Path(folder)).plan)).sampler
