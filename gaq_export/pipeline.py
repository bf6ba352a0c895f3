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
from dataclasses import dataclass, replace
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
from gaq_export import drawing, inspection, page, parity, provenance, samples
from gaq_export import run as runs
from gaq_export.collect import collect
from gaq_export.errors import GaqError
from gaq_export.group_norm import open_group_norms
from gaq_export.half import compute_in
from gaq_export.models import LoadedModel, load_model, wrap
from gaq_export.onnx_export import export_float
from gaq_export.parity import TOLERANCES, Parity
from gaq_export.presets import Preset, preset
from gaq_export.profiles import PROFILES, find_profile
from gaq_export.qdq import insert_qdq, save_onnx
from gaq_export.run import Run
from gaq_export.samples import Sampled
from gaq_export.schedule import SamplerSpec
from gaq_export.stepgraph import make_step

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


# Graph to what it computes.
GRAPHS = {
    "step": "one whole denoising step of a fixed sampler: (x, step) -> x_next",
    "eps": "the network alone, for any sampler: (x, t) -> eps",
}


# What weights and activations are rounded to, and what that makes of a backend's profile.
NUMBERS = {"int8": "", "fp8": "-fp8"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file, and the modules of the network that are tables in it."""

    path: Path
    baked: tuple[str, ...]


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
    profile: str,
    *,
    graph: str = "step",
    sampler: SamplerSpec | None = None,
    compute: str = "float32",
    folder: str | Path = runs.DEFAULT,
    model: LoadedModel | None = None,
    out: Path | None = None,
) -> Exported:
    """Write the quantized graph of one profile.

    Args:
        profile: a key of `gaq_export.profiles.PROFILES`.
        graph: a key of `GRAPHS`.
        sampler: whose steps a "step" graph takes; the plan's if None.
        compute: type of what is not integer, a key of `gaq_export.half.COMPUTE`.
        folder: run folder with a finished plan.
        model: the float model; found again from the plan if None.
        out: where to write; a file in the run folder if None.

    Raises:
        GaqError, CalibError: no plan, another model, or a graph that does not hold all its layers.
    """
    if graph not in GRAPHS:
        raise GaqError(f"Unknown graph {graph!r}. Choose one of {list(GRAPHS)}.")
    run, wishes = Run(folder=Path(folder)), find_profile(profile)
    plan = load_plan(run.plan)
    model = provenance.model_of(plan.about, model)
    network = export_float(model.network, model.shape)
    spec = sampler or SamplerSpec.from_json(plan.about["sampler"])
    step = make_step(network, model.schedule, spec) if graph == "step" else None
    path = out or run.onnx(profile, graph)
    insert_qdq(network, plan, wishes, step)
    if wishes.open_group_norms:
        open_group_norms(network)
    save_onnx(compute_in(network, compute), path)
    return Exported(path=path, baked=tuple(sorted(step.baked)) if step else ())


def sampler_of(folder: str | Path = runs.DEFAULT) -> SamplerSpec:
    """Return the sampler that the calibration in the run folder followed; raise CalibError if there is none."""
    return SamplerSpec.from_json(load_plan(Run(folder=Path(folder)).plan).about["sampler"])


def build_engine(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path = "unet.plan",
    config: EngineConfig | None = None,
    graph: str = "step",
    sampler: SamplerSpec | None = None,
    numbers: str = "int8",
    model: LoadedModel | None = None,
) -> Built:
    """Build an engine from the run's plan, audit it, and check it against fake-quantized PyTorch on the same inputs.

    The files at `out` change only once the new engine has passed.

    Args:
        folder: run folder with a finished plan.
        out: the engine file; its record goes to `<out>.json`.
        config: backend and batch profile; the best backend present if None.
        graph: a key of `GRAPHS`.
        sampler: what it will draw with; the plan's if None.
        numbers: a key of `NUMBERS`; "fp8" for TensorRT and plans of 8-bit activations only.
        model: the float model; found again from the plan if None.

    Raises:
        GaqError, CalibError, EngineError: no plan, no backend, numbers that it does not take, a failed build, or an
            engine below the parity floor.
    """
    run, out = Run(folder=Path(folder)), Path(out)
    config = config or EngineConfig(backend=engines.best_backend())
    backend = engines.find_backend(config.backend)
    if reason := backend.can_build():
        raise GaqError(f"{backend.name} cannot build here: {reason}")
    plan = load_plan(run.plan)
    profile = _profile(backend, numbers, plan)
    model = provenance.model_of(plan.about, model)
    bits = f"W{plan.config.weight.bits}A{plan.config.activation.bits}"
    spec = sampler or SamplerSpec.from_json(plan.about["sampler"])
    about = {
        **plan.about,
        "sampler": spec.to_json(),
        "graph": graph,
        "bits": bits,
        "numbers": numbers,
        "plan": {"sha256": _sha256(run.plan), "layers": len(plan.layers)},
    }
    with _staging(out) as staged:
        exported = export_onnx(
            profile,
            graph=graph,
            sampler=spec,
            compute=backend.compute(config.compute) if backend.typed else "float32",
            folder=run.folder,
            model=model,
        )
        about["baked"] = exported.baked
        file = engines.build(exported.path, staged / out.name, config, about)
        not_run = backend.can_run()
        checked = None if not_run else _check(file, plan, model, run, profile)
        for made in sorted(staged.iterdir(), key=lambda path: path.suffix == ".json"):  # the record last
            os.replace(made, out.with_name(made.name))
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
        sampler: how to draw; what the engine file says if None. An engine of steps knows no other.
        out: folder for the pictures.
        compare: draw the same images with the float model too, side by side with PSNR.
        model: the float model for `compare`; found again from the engine file if None.
        on_step: told who draws ("engine" or "float") and how many network calls are done, of how many.

    Raises:
        GaqError, EngineError: no images asked for, a batch outside the profile, a sampler that the engine does not
            have, an engine that cannot run here.
    """
    for what, count in (("images to draw", num), ("images at a time", batch)):
        if count is not None and count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
    file = engines.load_engine_file(engine)
    spec = drawing.sampler_of(file, sampler)
    schedule, shape = provenance.schedule_of(file.about), provenance.shape_of(file.about)
    size = file.batch[1] if batch is None else batch
    seeds = tuple(range(seed, seed + num))
    samples.check_writable(Path(out))
    float_model = provenance.model_of(file.about, model) if compare else None
    with engines.open_engine(file) as opened:
        started = time.perf_counter()
        some = drawing.by_engine(opened, file, schedule, shape, spec)
        drawn = samples.draw(some, seeds, size, spec.steps, partial(on_step, "engine"))
        seconds = time.perf_counter() - started
    reference = None
    if float_model is not None:
        some = drawing.by_network(float_model.network, schedule, shape, spec)
        reference = samples.draw(some, seeds, size, spec.steps, partial(on_step, "float"))
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


def _profile(backend: engines.Backend, numbers: str, plan: QuantPlan) -> str:
    """Return the profile of the backend's graph; raise GaqError if it has none of such numbers."""
    if numbers not in NUMBERS:
        raise GaqError(f"Unknown numbers {numbers!r}. Choose one of {list(NUMBERS)}.")
    profile = backend.profile + NUMBERS[numbers]
    if profile not in PROFILES:
        raise GaqError(f"{backend.name} does not compute in {numbers}; tensorrt and tensorrt-rtx do.")
    if numbers == "fp8" and plan.config.activation.bits != 8:
        raise GaqError(f"FP8 has 8 bits, this plan's activations {plan.config.activation.bits}: use --numbers int8.")
    return profile


def _check(file: EngineFile, plan: QuantPlan, model: LoadedModel, run: Run, profile: str) -> Parity:
    """Compare the engine with fake-quantized PyTorch on calibration samples; raise GaqError below the floor."""
    spec = drawing.sampler_of(file, None)
    count = max(file.batch[0], min(file.batch[2], parity.IMAGES))
    folder = run.calibration if spec == SamplerSpec.from_json(plan.about["sampler"]) else None
    data = collect(model, spec, images=max(2, count), seed=plan.config.seed, folder=folder)
    left = {name: layer for name, layer in plan.layers.items() if name not in file.about["baked"]}
    with engines.open_engine(file) as opened:
        result = parity.compare(
            fake_quantized(model.network, replace(plan, layers=left), float8=find_profile(profile).float8),
            left,
            drawing.noise_of(opened, file, model.schedule),
            data,
            TOLERANCES[profile],
            compute=file.compute,
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
