"""What a run's report shows: pictures and noise of the engine beside the float network's, its size, its speed.

In: a run folder, the engine built from it, and what `evaluate` found, if it was asked. Out: a `Report`, which
`report_page` writes down. What can be measured here in a minute is measured again; the rest is read.
"""

import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import engines
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from engines import EngineConfig, EngineFile
from gaq_export import run as runs
from gaq_export.deploy import session
from gaq_export.deploy.build import build_float
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.batching import Draw, draw_in_batches
from gaq_export.diffusion.conditioning import bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation import noise_sqnr
from gaq_export.evaluation.evaluate import DEFAULT, RECORD, Evaluation, read_evaluation
from gaq_export.evaluation.noise_sqnr import OnStage
from gaq_export.evaluation.timing import take_turns
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model, provenance_of
from gaq_export.report import inspect
from gaq_export.report.inspection import Inspection
from gaq_export.report.inspection_page import Origin
from gaq_export.run import Run, RunRecord

NoiseFor = Callable[[Sequence[int]], Denoiser]  # what predicts the noise in images of these seeds
PYTORCH = "PyTorch, float"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of an engine: its files, and the weights in it by element type."""

    files: int
    weights: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that whole loops took, in turn, one value a round, by who drew; of `batch` images."""

    batch: int
    seconds: Mapping[str, Sequence[float]]

    def median(self, who: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.seconds[who])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pictures (N, C, H, W) in [-1, 1] from the same noise, and SQNR in dB at each step along both trajectories.

    `told` is what each picture was told, for people; () if nothing.
    """

    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    quantized: Tensor
    exact: Tensor
    steps: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows.

    Attributes:
        plan: the run's plan.
        origin: how it was calibrated.
        inside: what is inside the calibration.
        file: the engine.
        others: those that take turns with it.
        not_run: why it cannot run here, so that PyTorch drew in its place; None if it ran.
        drawn: what it draws, and predicts.
        sizes: of the engine, and of one of the float network with the same backend.
        speed: of the loop; None if it was not measured.
        judged: what `evaluate` found of this engine; None if there is nothing.
        journal: what was done in the run folder.
    """

    plan: QuantPlan
    origin: Origin
    inside: Inspection
    file: EngineFile
    others: tuple[EngineFile, ...]
    not_run: str | None
    drawn: Drawn
    sizes: tuple[Sizes, Sizes]
    speed: Speed | None
    judged: Evaluation | None
    journal: Sequence[Mapping[str, Any]]


def measure(
    folder: Path,
    out: Path,
    *,
    engine: Path | None = None,
    judged: Path | None = None,
    block: str | None = None,
    images: int = 8,
    rounds: int = 3,
    model: LoadedModel | None = None,
    on_step: OnStage = lambda what, done, total: None,
) -> Report:
    """Measure and read everything.

    Args:
        folder: run folder with a finished plan.
        out: the page; scratch files lie beside it.
        engine: built from that plan; the last one if None.
        judged: folder of `evaluate`; the usual one if None, and if it is about this engine.
        block: which one to look into, as for `inspect`.
        images: pictures, and fresh trajectories on which the noise is compared.
        rounds: of the loop's timing, 0 for none.
        model: the float model; found again from the plan if None.
        on_step: told what is at work, how much of it is done, of how much.

    Raises:
        GaqError, CalibError, EngineError: no plan, no engine of it, another model, or no evaluation of this engine.
    """
    run = Run(folder=folder)
    plan, record = load_plan(run.plan), runs.read_record(run)
    file = engine_of(run, record, engine)
    found, model = evaluation_of(judged, file), find_model(provenance_of(plan), model, folder)
    others = session.others_of(file)
    inside, origin = inspect.examine(run, plan, model, out, block=block, images=images, on_step=on_step)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        config = EngineConfig(backend=file.backend, batch=file.batch, targets=file.targets, threads=file.threads)
        spec = record_of(file).provenance.sampler
        exact = build_float(model, Path(scratch) / "float.plan", sampler=spec, config=config)
        with _opened(file, model, plan) as (draw, noise_for):
            drawn = _draw(file, model, draw, noise_for, images, on_step)
            speed = _time(file, exact, model, plan, draw, rounds, on_step)
        sizes = (_sizes(file, *others), _sizes(exact))
    return Report(
        plan=plan,
        origin=origin,
        inside=inside,
        file=file,
        others=others,
        not_run=engines.find_backend(file.backend).can_run(),
        drawn=drawn,
        sizes=sizes,
        speed=speed,
        judged=found,
        journal=record.journal,
    )


def engine_of(run: Run, record: RunRecord, asked: Path | None) -> EngineFile:
    """Return the engine asked for, or the last one built; raise GaqError if there is none of this plan."""
    last = record.last("build-engine").get("engine")
    path = asked or (last and Path(os.path.normpath(run.folder / last)))
    if path is None:
        raise GaqError(f"{run.folder} records no engine: run `gaq-export build-engine --run {run.folder}` first.")
    file = engines.load_engine_file(path)
    built_from = record_of(file).plan
    if built_from is None or built_from.sha256 != engines.sha256_of(run.plan):
        raise GaqError(f"{file.path} was not built from the plan in {run.folder}: build it again, or give --engine.")
    return file


def evaluation_of(folder: Path | None, file: EngineFile) -> Evaluation | None:
    """Return what was found of this engine; raise GaqError if it was asked for and there is nothing."""
    if folder is None and not (DEFAULT / RECORD).is_file():
        return None
    found = read_evaluation(folder or DEFAULT)
    about = {f.context.get("engine_sha256") for figures in found.rows.values() for f in figures}
    if file.sha256 in about:
        return found
    if folder is not None:
        raise GaqError(f"{found.path} is not about {file.path}: run `gaq-export evaluate --engine {file.path}`.")
    return None


@contextmanager
def _opened(file: EngineFile, model: LoadedModel, plan: QuantPlan) -> Iterator[tuple[Draw, NoiseFor]]:
    """Yield what draws, and what predicts for images of given seeds: the engine, or PyTorch where it cannot run."""
    if not engines.find_backend(file.backend).can_run():
        with session.open_engines(file) as engine, session.open_decoder(file) as decode:
            sampling = replace(session.sampling_of(file), decode=decode)
            yield session.draw_with_engine(engine, file, sampling), partial(session.denoiser_for, engine, file)
        return
    network, record = fake_quantized(model.network, plan), record_of(file)
    sampling = replace(model.image_sampling(record.provenance.sampler), correction=record.correction)
    yield session.draw_with_network(network, sampling), partial(bind, network, model.conditioning)


def _by_float(model: LoadedModel, spec: SamplerSpec) -> Draw:
    return session.draw_with_network(model.network, model.image_sampling(spec))


def _draw(
    file: EngineFile, model: LoadedModel, draw: Draw, noise_for: NoiseFor, images: int, on_step: OnStage
) -> Drawn:
    spec, seeds = record_of(file).provenance.sampler, tuple(range(images))
    by_float = _by_float(model, spec)
    pictures, exact = (
        draw_in_batches(by, seeds, file.batch[1], spec.steps, partial(on_step, f"drawing ({who}), step"))
        for who, by in (("quantized", draw), ("float", by_float))
    )
    together = range(max(file.batch[0], min(images, file.batch[2])))
    exactly = bind(model.network, model.conditioning, together)
    steps = noise_sqnr.along_both(noise_for(together), exactly, together, model.sampling(spec))
    captions = () if model.conditioning is None else tuple(map(model.conditioning.name_of, seeds))
    return Drawn(seeds=seeds, captions=captions, quantized=pictures, exact=exact, steps=steps)


def _time(
    file: EngineFile,
    exact: EngineFile,
    model: LoadedModel,
    plan: QuantPlan,
    draw: Draw,
    rounds: int,
    on_step: OnStage,
) -> Speed | None:
    """Time whole loops in turn, if asked to and if the engine runs here."""
    if not rounds or engines.find_backend(file.backend).can_run():
        return None
    seeds, done = range(file.batch[1]), 0
    by_float = _by_float(model, record_of(file).provenance.sampler)

    def loop(by: Draw) -> None:
        nonlocal done
        by(seeds, lambda: None)
        done += 1
        on_step("timing the loop", done, 3 * (rounds + 1))

    with _opened(exact, model, plan) as (by_exact, _):
        loops = {PYTORCH: by_float, f"{file.backend}, float": by_exact, f"{file.backend}, {record_of(file).bits}": draw}
        seconds = take_turns({who: partial(loop, by) for who, by in loops.items()}, rounds)
    return Speed(batch=len(seeds), seconds=seconds)


def _sizes(*files: EngineFile) -> Sizes:
    weights: Counter[str] = Counter()
    for file in files:
        weights.update(file.audit.weight_bytes)
    return Sizes(files=sum(file.path.stat().st_size for file in files), weights=weights)
