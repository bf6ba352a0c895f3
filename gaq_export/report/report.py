"""What a run's report shows: the engine's images and noise beside the float network's, its size and its speed.

In: a run folder, the engine built from it, and an evaluation if there is one. Out: a `Report`, of which `report_page`
makes a page. What takes a minute is measured again, so that it is about this machine; the rest is read from files.
"""

import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import engines
from calib.fakequant import fake_quantized
from calib.leftovers import temporary_name
from calib.plan import QuantPlan, load_plan
from engines import EngineConfig, EngineFile
from gaq_export import folders
from gaq_export import run as runs
from gaq_export.deploy import session
from gaq_export.deploy.build import build_float
from gaq_export.deploy.float_timing import float_compute
from gaq_export.deploy.record import record_of
from gaq_export.devices import ON_HOST, Device
from gaq_export.diffusion.batching import Draw, draw_in_batches
from gaq_export.diffusion.conditioning import bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation.evaluate import DEFAULT, RECORD, Evaluation, read_evaluation
from gaq_export.evaluation.timing import take_turns
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model, provenance_of
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.noise_sqnr import OnStage
from gaq_export.quantize.verdict import Verdict, judge
from gaq_export.report import inspect
from gaq_export.report.inspection import Calibrated, Inspection, InspectionOptions
from gaq_export.report.inspection_page import Origin
from gaq_export.run import Run, RunRecord

NoiseFor = Callable[[Sequence[int]], Denoiser]  # seeds -> what predicts the noise in their images
PYTORCH = "PyTorch, float"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a user may choose.

    Attributes:
        engine: built from the run's plan; the last one built if None.
        evaluation: folder that `evaluate` wrote; the usual one if None, provided that it is about this engine.
        inspection: what is measured inside the calibration; its number of images is that of the pictures too.
        rounds: how often the loop is timed; 0 for no timing.
        gpu: number of the GPU, for an engine of GPUs.
        device: where a float model that is loaded again computes.
    """

    engine: Path | None = None
    evaluation: Path | None = None
    inspection: InspectionOptions = field(default_factory=InspectionOptions)
    rounds: int = 3
    gpu: int = 0
    device: Device = ON_HOST


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of an engine: its files, and the weights in it by element type."""

    files: int
    weights: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of whole loops of `batch` images that took turns, one value a round, by what drew."""

    batch: int
    seconds: Mapping[str, Sequence[float]]

    def median(self, who: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.seconds[who])


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePairs:
    """Images of the quantized and of the float network from the same noise.

    Attributes:
        seeds: one an image.
        captions: the class or prompt of each image; () for an unconditional model.
        quantized: (N, C, H, W) in [-1, 1].
        exact: the float network's, likewise.
    """

    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    quantized: Tensor
    exact: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that the page shows.

    Attributes:
        plan: the run's plan.
        origin: how it was calibrated.
        verdict: how far the plan is from the float network.
        inspection: what is inside the calibration.
        file: the engine.
        others: engines that take turns with it.
        not_run: why it cannot run here, so that PyTorch drew in its place; None if it ran.
        images: its images beside the float network's.
        noise: SQNR in dB of each step, by trajectory.
        sizes: of the engine, and of one of the float network with the same backend.
        speed: of the loop; None if it was not measured.
        evaluation: of this engine; None if there is none.
        journal: what was done in the run folder.
    """

    plan: QuantPlan
    origin: Origin
    verdict: Verdict
    inspection: Inspection
    file: EngineFile
    others: tuple[EngineFile, ...]
    not_run: str | None
    images: ImagePairs
    noise: Mapping[str, Sequence[float]]
    sizes: tuple[Sizes, Sizes]
    speed: Speed | None
    evaluation: Evaluation | None
    journal: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Engines:
    """What is compared: an engine, one of the float network by the same backend, and both networks in PyTorch."""

    file: EngineFile
    exact: EngineFile
    model: LoadedModel
    plan: QuantPlan

    @property
    def sampler(self) -> SamplerSpec:
        return record_of(self.file).provenance.sampler

    @property
    def not_run(self) -> str | None:
        return engines.find_backend(self.file.backend).can_run(self.file.gpu)


def measure(
    folder: Path,
    out: Path,
    options: ReportOptions,
    *,
    model: LoadedModel | None = None,
    on_step: OnStage = lambda what, done, total: None,
) -> Report:
    """Measure and read everything.

    Args:
        folder: run folder with a finished plan.
        out: the page; scratch files lie beside it.
        options: which engine, and how much is measured.
        model: the float model; loaded again by the plan's provenance if None.
        on_step: called with (what is being done, done, total).

    Raises:
        GaqError, CalibError, EngineError: no plan, no engine of it, another model, or no evaluation of this engine.
    """
    run = Run(folder=folder)
    plan = load_plan(run.plan)
    record = runs.read_record(run)
    file = replace(engine_of(run, record, options.engine), gpu=options.gpu)
    session.require_pictures(file)  # before anything that takes minutes
    evaluation = evaluation_of(options.evaluation, file)
    model = find_model(provenance_of(plan), model, folder, options.device)
    inspect.check_page(run, out, model)
    folders.check_outputs([out], [*engines.files.files_of(file.path), *([evaluation.path] if evaluation else [])])
    others = session.others_of(file)
    calibrated = Calibrated(model=model, plan=plan)
    inspection, origin = inspect.examine(run, calibrated, options.inspection, beside=out, on_step=on_step)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{temporary_name(out.parent, out.name)}.") as scratch:
        compared = _Engines(file=file, exact=_build_exact(file, model, Path(scratch)), model=model, plan=plan)
        with _open(compared, file) as (draw, noise_for):
            return Report(
                plan=plan,
                origin=origin,
                verdict=judge(folder, model, on_step),
                inspection=inspection,
                file=file,
                others=others,
                not_run=compared.not_run,
                images=_draw(compared, draw, options.inspection.images, on_step),
                noise=_compare_noise(compared, noise_for, options.inspection.images),
                sizes=(_sizes(file, *others), _sizes(compared.exact)),
                speed=_time(compared, draw, options.rounds, on_step),
                evaluation=evaluation,
                journal=record.journal,
            )


def engine_of(run: Run, record: RunRecord, path: Path | None) -> EngineFile:
    """Return the engine at `path`, or the last one built if that is None.

    Raises:
        GaqError: no engine was built, or this one was built from another plan.
    """
    last = record.last("build-engine").get("engine")
    # The journal's paths are relative to the run folder, so that both can move together.
    path = path or (last and Path(os.path.normpath(run.folder / last)))
    if path is None:
        raise GaqError(f"{run.folder} records no engine: run `gaq-export build-engine --run {run.folder}` first.")
    file = engines.load_engine_file(path)
    built_from = record_of(file).plan
    # By content, since a plan that was calibrated again has the same path.
    if built_from is None or built_from.sha256 != engines.sha256_of(run.plan):
        raise GaqError(f"{file.path} was not built from the plan in {run.folder}: build it again, or give --engine.")
    return file


def evaluation_of(folder: Path | None, file: EngineFile) -> Evaluation | None:
    """Return the evaluation of this engine in a folder, or in the usual one, where it may be missing.

    Raises:
        GaqError: `folder` holds no evaluation, or one that is not about this engine.
    """
    if folder is None and not (DEFAULT / RECORD).is_file():
        return None
    evaluation = read_evaluation(folder or DEFAULT)
    evaluated = {score.context.get("engine_sha256") for row in evaluation.rows.values() for score in row}
    if file.sha256 in evaluated:
        return evaluation
    # In the usual folder there may well be an evaluation of another engine; one that was named must be of this.
    if folder is not None:
        raise GaqError(f"{evaluation.path} is not about {file.path}: run `gaq-export evaluate --engine {file.path}`.")
    return None


def _build_exact(file: EngineFile, model: LoadedModel, folder: Path) -> EngineFile:
    """Build an engine of the float network as `file` was built."""
    # For the same batches, targets and threads, so that the two differ in size and speed by quantization alone; on a
    # GPU the float engine that counts is of FP16, whatever the other computes in outside its integers.
    config = EngineConfig(
        backend=file.backend, batch=file.batch, targets=file.targets, threads=file.threads, gpu=file.gpu
    )
    compute = float_compute(engines.find_backend(file.backend), file.compute)
    sampler = record_of(file).provenance.sampler
    built = build_float(model, folder / "float.plan", sampler=sampler, config=config, compute=compute)
    return replace(built, gpu=file.gpu)


@contextmanager
def _open(compared: _Engines, file: EngineFile) -> Iterator[tuple[Draw, NoiseFor]]:
    """Yield what draws, and what predicts the noise in images of some seeds: `file`, or PyTorch if it cannot run."""
    if compared.not_run is None:
        with session.open_engines(file) as engine, session.open_decoder(file) as decode:
            sampling = replace(session.sampling_of(file), decode=decode)
            yield session.draw_with_engine(engine, file, sampling), partial(session.denoiser_for, engine, file)
        return
    model = compared.model
    record = record_of(file)
    network = fake_quantized(model.network, compared.plan)
    sampling = replace(model.image_sampling(record.provenance.sampler), correction=record.correction)
    yield session.draw_with_network(network, sampling), partial(bind, network, model.conditioning)


def _float_draw(compared: _Engines) -> Draw:
    return session.draw_with_network(compared.model.network, compared.model.image_sampling(compared.sampler))


def _draw(compared: _Engines, draw: Draw, images: int, on_step: OnStage) -> ImagePairs:
    """Draw with the quantized and with the float network from the same noise."""
    seeds = tuple(range(images))
    conditioning = compared.model.conditioning
    batch = compared.file.batch[1]  # of smallest, best, largest
    steps = compared.sampler.steps
    quantized, exact = (
        draw_in_batches(by, seeds, batch, steps, partial(on_step, f"drawing ({who}), step"))
        for who, by in (("quantized", draw), ("float", _float_draw(compared)))
    )
    captions = () if conditioning is None else tuple(map(conditioning.name_of, seeds))
    return ImagePairs(seeds=seeds, captions=captions, quantized=quantized, exact=exact)


def _compare_noise(compared: _Engines, noise_for: NoiseFor, images: int) -> Mapping[str, Sequence[float]]:
    """Return the SQNR of each step along both trajectories, of as many images as fit into one batch of the engine."""
    model = compared.model
    file = compared.file
    # batch is (smallest, best, largest).
    seeds = range(max(file.batch[0], min(images, file.batch[2])))
    exact = bind(model.network, model.conditioning, seeds)
    return noise_sqnr.along_both(noise_for(seeds), exact, seeds, model.sampling(compared.sampler))


def _time(compared: _Engines, draw: Draw, rounds: int, on_step: OnStage) -> Speed | None:
    """Time whole loops in turn; return None without rounds, or if the engine cannot run here."""
    if not rounds or compared.not_run is not None:
        return None
    file = compared.file
    seeds = range(file.batch[1])
    done = 0

    def loop(by: Draw) -> None:
        nonlocal done
        by(seeds, lambda: None)  # without progress: a callback for each step would be timed too
        done += 1
        on_step("timing the loop", done, 3 * (rounds + 1))  # three loops, each with a warm-up

    with _open(compared, compared.exact) as (exact_draw, _):
        loops = {
            PYTORCH: _float_draw(compared),
            f"{file.backend}, {compared.exact.compute}": exact_draw,
            f"{file.backend}, {record_of(file).bits}": draw,
        }
        seconds = take_turns({who: partial(loop, by) for who, by in loops.items()}, rounds)
    return Speed(batch=len(seeds), seconds=seconds)


def _sizes(*files: EngineFile) -> Sizes:
    weights: Counter[str] = Counter()
    # Engines that take turns hold the weights several times.
    for file in files:
        weights.update(file.audit.weight_bytes)
    return Sizes(files=sum(file.path.stat().st_size for file in files), weights=weights)
