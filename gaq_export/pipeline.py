"""The story, and the Python API: one function for each command.

    calibrate     float model            -> QuantPlan      in the run folder
    build_engine  plan                   -> QDQ ONNX -> unet.plan, audited, checked against PyTorch
    sample        unet.plan              -> images, or shards of them
    inspect       run folder             -> a page about its calibration

A model is a `LoadedModel`: from `load_model` by name or folder, or from `wrap` for any module called as (x, t).
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import engines
from calib import config as configs
from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan, save_plan
from calib.progress import Progress
from gaq_export import crew, drawing, inspection, latency, page, provenance, samples, shards, telling
from gaq_export import run as runs
from gaq_export.building import Built, build_engine
from gaq_export.collect import collect
from gaq_export.conditions import Conditions
from gaq_export.errors import GaqError
from gaq_export.exporting import export_onnx
from gaq_export.inspection import Inspection
from gaq_export.learning import learn
from gaq_export.models import LoadedModel, load_model, wrap
from gaq_export.presets import Preset, preset
from gaq_export.run import Run
from gaq_export.samples import Sampled, Streamed
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
    run, model = Run(folder=Path(folder)), telling.tell(model)
    spec = sampler or model.spec.sampler
    about = provenance.describe(model, spec)
    settings = {"model": about["model"], "sampler": about["sampler"], "images": chosen.images}
    if model.conditions is not None:
        told = model.conditions
        settings |= {"told": list(told.names), "guidance": told.guidance, "told_sha256": told.sha256}
    runs.begin(run, settings | {"config": json.loads(json.dumps(configs.to_json(chosen.config)))})
    if run.plan.exists():
        return load_plan(run.plan)
    if model.conditions is not None:
        model.conditions.save(run.folder)
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
        about=about,
        folder=run.blocks,
        clock=partial(latency.step_times, model, kept=run.times),
        on_progress=keep,
        on_step=on_correct,
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


def sampler_of(folder: str | Path = runs.DEFAULT) -> SamplerSpec:
    """Return the sampler that the calibration in the run folder followed; raise CalibError if there is none."""
    return SamplerSpec.from_json(load_plan(Run(folder=Path(folder)).plan).about["sampler"])


def sample(
    engine: str | Path = "unet.plan",
    *,
    num: int = 16,
    seed: int = 0,
    batch: int | None = None,
    sampler: SamplerSpec | None = None,
    out: str | Path = "samples",
    compare: bool = False,
    told: Conditions | None = None,
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
        told: what to draw; what the engine file says if None.
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
    drawing.require_pictures(file)
    spec = drawing.sampler_of(file, sampler)
    schedule, shape = provenance.schedule_of(file.about), provenance.shape_of(file.about)
    size = file.batch[1] if batch is None else batch
    seeds = tuple(range(seed, seed + num))
    samples.check_writable(Path(out))
    told = told or drawing.told_by(file)
    float_model = provenance.model_of(file.about, model, file.path.parent) if compare else None
    with drawing.open_engines(file) as opened, drawing.open_decoder(file) as decode:
        started = time.perf_counter()
        some = drawing.by_engine(opened, file, schedule, shape, spec, decode, told)
        drawn = samples.draw(some, seeds, size, spec.steps, partial(on_step, "engine"))
        seconds = time.perf_counter() - started
    reference = None
    if float_model is not None:
        decode = drawing.decoding(float_model.decoder)
        some = drawing.by_network(float_model.network, schedule, shape, spec, told=told, decode=decode)
        reference = samples.draw(some, seeds, size, spec.steps, partial(on_step, "float"))
    return samples.write(Path(out), file, spec, told, seeds, drawn, reference, seconds)


def sample_shards(
    engine: str | Path = "unet.plan",
    *,
    num: int,
    seed: int = 0,
    batch: int | None = None,
    sampler: SamplerSpec | None = None,
    out: str | Path = "samples",
    shard: int = 256,
    told: Conditions | None = None,
    workers: int = 1,
    ray: str | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Streamed:
    """Draw any number of images to files of `shard` images each; the same call again draws what is missing.

    Args:
        engine: the engine file.
        num: number of images; image i has seed `seed + i`.
        seed: of the first image.
        batch: images at a time, within the engine's profile; its best batch if None.
        sampler: as for `sample`.
        out: folder for the files, see `gaq_export.shards`.
        shard: images in a file.
        told: as for `sample`.
        workers: processes that draw, one thread each.
        ray: address of a Ray cluster that draws instead, or "local".
        on_images: told how many images there are, of how many.

    Raises:
        GaqError, EngineError: as for `sample`; a folder that holds other images; a worker that died.
    """
    for what, count in (("images to draw", num), ("images a shard", shard), ("workers", workers)):
        if count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
    file, out = engines.load_engine_file(engine), Path(out)
    drawing.require_pictures(file)
    spec = drawing.sampler_of(file, sampler)
    size = file.batch[1] if batch is None else batch
    if not file.batch[0] <= size <= file.batch[2]:
        raise GaqError(f"Found {size} images at a time; this engine takes {file.batch[0]} to {file.batch[2]}.")
    samples.check_writable(out)
    told = told or drawing.told_by(file)
    conditions = samples.conditions(file, spec, told)
    order = shards.Order(num=num, seed=seed, shard=shard, batch=size, conditions=conditions)
    shards.claim(out, order)
    todo = shards.missing(out, order)
    done = num - sum(len(order.seeds(index)) for index in todo)
    started, drawn = time.perf_counter(), 0
    on_images(done, num)
    draw = crew.choose(file, spec, size, told, min(workers, len(todo)), ray)
    for index, images in draw([(index, order.seeds(index)) for index in todo]) if todo else ():
        shards.write_shard(out, order, index, images)
        drawn += len(images)
        on_images(done + drawn, num)
    grid = samples.write_overview(out, file, conditions, told, *next(shards.read_shards(out)))
    return Streamed(
        folder=out, grid=grid, drawn=drawn, seconds=time.perf_counter() - started, digest=shards.digest(out)
    )


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
    model = provenance.model_of(plan.about, model, run.folder)
    found, origin = examine(run, plan, model, path, block=block, images=images, on_step=on_step)
    write_atomically(path, page.render(plan, found, origin).encode())
    return path


def examine(
    run: Run,
    plan: QuantPlan,
    model: LoadedModel,
    out: Path,
    *,
    block: str | None,
    images: int,
    on_step: Callable[[str, int, int], None],
) -> tuple[Inspection, page.Origin]:
    """Measure what a page about a calibration shows, the arguments as for `inspect`; scratch files lie beside `out`."""
    settings, journal = runs.recall(run)
    with runs.staging(out) as staged:
        data = collect(
            model,
            SamplerSpec.from_json(plan.about["sampler"]),
            images=settings["images"],
            seed=plan.config.seed,
            folder=run.calibration,
            on_step=partial(on_step, "collecting"),
        )
        found = inspection.examine(
            model, plan, data, block=block, images=images, scratch=staged / "scratch", on_step=on_step
        )
    return found, page.Origin(settings=settings, journal=runs.last(journal, "calibrate"))
