"""The story, and the Python API: one function for each command.

    calibrate     float model            -> QuantPlan      in the run folder
    build_engine  plan                   -> QDQ ONNX -> unet.plan, audited, checked against PyTorch
    sample        unet.plan              -> images
    inspect       run folder             -> a page about its calibration

A model is a `LoadedModel`: from `load_model` by name or folder, or from `wrap` for any module called as (x, t).
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import engines
from calib import config as configs
from calib.calibrate import calibrate as quantize
from calib.fakequant import fake_quantized
from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan, save_plan
from calib.progress import Progress
from engines import EngineConfig, EngineFile
from gaq_export import inspection, page, parity, provenance, samples
from gaq_export import run as runs
from gaq_export.collect import collect
from gaq_export.denoiser import engine_denoiser
from gaq_export.errors import GaqError
from gaq_export.models import LoadedModel, load_model, wrap
from gaq_export.onnx_export import export_float
from gaq_export.parity import TOLERANCES, Parity
from gaq_export.presets import Preset, preset
from gaq_export.profiles import find_profile
from gaq_export.qdq import insert_qdq, save_onnx
from gaq_export.run import Run
from gaq_export.samples import Sampled
from gaq_export.schedule import SamplerSpec

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
    "wrap",
]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built engine; `parity` is None where it cannot run here, and `not_run` says why."""

    file: EngineFile
    plan: QuantPlan
    parity: Parity | None
    not_run: str | None


def calibrate(
    model: LoadedModel,
    chosen: Preset,
    *,
    folder: str | Path = runs.DEFAULT,
    sampler: SamplerSpec | None = None,
    on_collect: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QuantPlan:
    """Quantize `model`, keeping everything in the run folder; the same call again continues or returns the result.

    Args:
        model: what to quantize.
        chosen: schedule and bits, from `preset`.
        folder: run folder.
        sampler: sampler the calibration follows; the model's own if None.
        on_collect: told (network calls done, in all) while trajectories are drawn.
        on_progress: told after every iteration and block.

    Raises:
        GaqError, CalibError: bad settings, a folder that holds another run, or one that cannot be written.
    """
    run, spec = Run(folder=Path(folder)), sampler or model.spec.sampler
    about = provenance.describe(model, spec)
    settings = {"model": about["model"], "sampler": about["sampler"], "images": chosen.images}
    runs.begin(run, settings | {"config": json.loads(json.dumps(configs.to_json(chosen.config)))})
    if run.plan.exists():
        return load_plan(run.plan)
    started = time.perf_counter()
    seed = chosen.config.seed
    data = collect(model, spec, images=chosen.images, seed=seed, folder=run.calibration, on_step=on_collect)
    collected = time.perf_counter()
    phases: dict[str, float] = {}

    def keep(progress: Progress) -> None:
        phases.update(progress.seconds)
        on_progress(progress)

    plan = quantize(
        model.network,
        data,
        chosen.config,
        timesteps=model.schedule.num_train,
        about=about,
        folder=run.blocks,
        on_progress=keep,
    )
    save_plan(plan, run.plan)
    runs.note(
        run,
        "calibrate",
        collect_seconds=round(collected - started, 1),
        seconds=round(time.perf_counter() - collected, 1),
        phase_seconds={name: round(seconds, 1) for name, seconds in phases.items()},
        peak_memory_mib=runs.peak_memory_mib(),
    )
    return plan


def export_onnx(
    profile: str, *, folder: str | Path = runs.DEFAULT, model: LoadedModel | None = None, out: Path | None = None
) -> Path:
    """Write the quantized graph of one profile and return its path.

    Args:
        profile: a key of `gaq_export.profiles.PROFILES`.
        folder: run folder with a finished plan.
        model: the float model; found again from the plan if None.
        out: where to write; a file in the run folder if None.

    Raises:
        GaqError, CalibError: no plan, another model, or a graph that does not hold all its layers.
    """
    run, wishes = Run(folder=Path(folder)), find_profile(profile)
    plan = load_plan(run.plan)
    model = provenance.model_of(plan.about, model)
    graph = insert_qdq(export_float(model.network, model.shape), plan, wishes)
    path = out or run.onnx(profile)
    save_onnx(graph, path)
    return path


def build_engine(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path = "unet.plan",
    config: EngineConfig | None = None,
    model: LoadedModel | None = None,
) -> Built:
    """Build an engine from the run's plan, audit it, and check it against fake-quantized PyTorch on the same inputs.

    The files at `out` change only once the new engine has passed.

    Args:
        folder: run folder with a finished plan.
        out: the engine file; its record goes to `<out>.json`.
        config: backend and batch profile; the best backend present if None.
        model: the float model; found again from the plan if None.

    Raises:
        GaqError, CalibError, EngineError: no plan, no backend, a failed build, or an engine below the parity floor.
    """
    run, out = Run(folder=Path(folder)), Path(out)
    config = config or EngineConfig(backend=engines.best_backend())
    backend = engines.find_backend(config.backend)
    if reason := backend.can_build():
        raise GaqError(f"{backend.name} cannot build here: {reason}")
    plan = load_plan(run.plan)
    model = provenance.model_of(plan.about, model)
    bits = f"W{plan.config.weight.bits}A{plan.config.activation.bits}"
    about = {**plan.about, "bits": bits, "plan": {"sha256": _sha256(run.plan), "layers": len(plan.layers)}}
    with _staging(out) as staged:
        graph = export_onnx(backend.profile, folder=run.folder, model=model)
        file = engines.build(graph, staged / out.name, config, about)
        not_run = backend.can_run()
        checked = None if not_run else _check(file, plan, model, run, backend.profile)
        for name in (out.name, f"{out.name}.json"):
            os.replace(staged / name, out.with_name(name))
    runs.note(
        run,
        "build-engine",
        backend=backend.name,
        seconds=round(file.build_seconds, 1),
        sqnr_db=checked and checked.sqnr_db,
    )
    return Built(file=engines.load_engine_file(out), plan=plan, parity=checked, not_run=not_run)


def sample(
    engine: str | Path = "unet.plan",
    *,
    num: int = 16,
    seed: int = 0,
    batch: int | None = None,
    sampler: SamplerSpec | None = None,
    out: str | Path = "samples",
    compare: bool = False,
    model: LoadedModel | None = None,
    on_step: Callable[[str, int, int], None] = lambda who, done, total: None,
) -> Sampled:
    """Run the whole denoising loop and write PNGs, a grid and samples.json.

    Args:
        engine: the engine file.
        num: number of images; image i has seed `seed + i`.
        seed: of the first image.
        batch: images at a time, within the engine's profile; its best batch if None.
        sampler: how to draw; what the engine file says if None.
        out: folder for the pictures.
        compare: draw the same images with the float model too, side by side with PSNR.
        model: the float model for `compare`; found again from the engine file if None.
        on_step: told who draws ("engine" or "float") and how many network calls are done, of how many.

    Raises:
        GaqError, EngineError: no images asked for, a batch outside the profile, an engine that cannot run here.
    """
    for what, count in (("images to draw", num), ("images at a time", batch)):
        if count is not None and count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
    file = engines.load_engine_file(engine)
    spec = sampler or SamplerSpec.from_json(file.about["sampler"])
    schedule, shape = provenance.schedule_of(file.about), provenance.shape_of(file.about)
    size = file.batch[1] if batch is None else batch
    seeds = tuple(range(seed, seed + num))
    samples.check_writable(Path(out))
    float_model = provenance.model_of(file.about, model) if compare else None
    with engines.open_engine(file) as opened:
        started = time.perf_counter()
        drawn = samples.draw(engine_denoiser(opened), seeds, size, shape, schedule, spec, partial(on_step, "engine"))
        seconds = time.perf_counter() - started
    reference = None
    if float_model is not None:
        reference = samples.draw(float_model.network, seeds, size, shape, schedule, spec, partial(on_step, "float"))
    return samples.write(Path(out), file, spec, seeds, drawn, reference, seconds)


def inspect(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path | None = None,
    block: str | None = None,
    images: int = 8,
    model: LoadedModel | None = None,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write one HTML page with figures on a finished calibration, and return its path.

    Args:
        folder: run folder with a finished plan.
        out: where to write; inspect.html in the run folder if None.
        block: which block to look into; the one with the largest loss at nearest rounding if None.
        images: fresh trajectories on which the noise prediction is compared with the float model's.
        model: the float model; found again from the plan if None.
        on_step: told what is at work, how much of it is done, of how much.

    Raises:
        GaqError, CalibError: no plan, an unknown block, another model, or a page that cannot be written.
    """
    run = Run(folder=Path(folder))
    plan, path = load_plan(run.plan), Path(out or run.page)
    settings, journal = runs.recall(run)
    model = provenance.model_of(plan.about, model)
    spec = SamplerSpec.from_json(plan.about["sampler"])
    with _staging(path) as staged:
        data = collect(
            model,
            spec,
            images=settings["images"],
            seed=plan.config.seed,
            folder=run.calibration,
            on_step=partial(on_step, "collecting"),
        )
        found = inspection.examine(
            model, plan, data, block=block, images=images, scratch=staged / "scratch", on_step=on_step
        )
        text = page.render(plan, found, page.Origin(settings=settings, journal=journal))
        write_atomically(path, text.encode())
    return path


def _check(file: EngineFile, plan: QuantPlan, model: LoadedModel, run: Run, profile: str) -> Parity:
    """Compare the engine with fake-quantized PyTorch on calibration samples; raise GaqError below the floor."""
    spec = SamplerSpec.from_json(plan.about["sampler"])
    count = max(file.batch[0], min(file.batch[2], parity.IMAGES))
    data = collect(model, spec, images=max(2, count), seed=plan.config.seed, folder=run.calibration)
    with engines.open_engine(file) as opened:
        result = parity.compare(
            fake_quantized(model.network, plan),
            plan.layers,
            engine_denoiser(opened),
            data,
            TOLERANCES[profile],
            images=count,
        )
    if not result.passed:
        worst = result.worst
        raise GaqError(
            f"The {file.backend} engine differs from fake-quantized PyTorch: SQNR {result.sqnr_db[worst]:.1f} dB at "
            f"step {result.steps[worst]}, at least {result.required_db(worst):.1f} dB expected. Nothing was replaced; "
            "try another --backend."
        )
    return result


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, so that a rename puts the finished files in place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise GaqError(f"Cannot write to {out.parent}: {error.strerror}. Choose a folder you may write to.") from error
    with folder as name:
        yield Path(name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
