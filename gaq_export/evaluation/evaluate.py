"""Draw with engines and score their images, or score images that exist already; write all scores to one JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import engines
from calib.files import write_atomically
from calib.records import check_record, read_signed, signed
from engines import EngineConfig, EngineFile
from engines.files import files_of
from engines.machine import versions
from gaq_export import folders
from gaq_export.deploy import session
from gaq_export.deploy.build import build_float
from gaq_export.deploy.record import record_of
from gaq_export.devices import ON_HOST, Device
from gaq_export.diffusion.batching import check_seeds
from gaq_export.diffusion.conditioning import bind
from gaq_export.errors import GaqError
from gaq_export.evaluation import scores
from gaq_export.evaluation.feature_extractors import Extractor
from gaq_export.evaluation.image_sets import ImageSet, open_images
from gaq_export.evaluation.scores import LEFT_OUT, Score
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import files_of_model, find_model
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.noise_sqnr import OnStage
from gaq_export.run import command_and_versions
from gaq_export.sampling.sample import sample_shards

RECORD = "evaluation.json"
FLOAT = "float.plan"  # the engine of the float network, beside it
DEFAULT = Path("evaluation")
TRAJECTORIES = 8  # on which the predicted noise is compared
SHARD = 256  # images in a file
LIBRARIES = ("torch-fidelity", "numpy", "scipy", "scikit-image")
Rows = Mapping[str, Sequence[Score]]
StepRows = Mapping[str, Mapping[str, Sequence[float]]]  # by row, then by trajectory: SQNR in dB of each step


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result: scores by row, SQNR of the predicted noise by row, the metrics left out, and the file it is in."""

    rows: Rows
    steps: StepRows
    left_out: Sequence[str]
    path: Path


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How the images to evaluate are drawn.

    Attributes:
        num: images of each network.
        out: folder for images, features and the result; the same call again continues what is in it.
        seed: of the first image.
        workers: processes that draw.
        ray: address of a Ray cluster that draws instead, None for none.
        gpu: number of the GPU, for engines of GPUs.
        device: where a float model that is loaded again computes, to compare the predicted noise.
    """

    num: int
    out: Path
    seed: int = 0
    workers: int = 1
    ray: str | None = None
    gpu: int = 0
    device: Device = ON_HOST

    def __post_init__(self) -> None:
        check_seeds(self.seed, 3 * self.num)  # the reference has twice as many images, of the seeds that follow


def evaluate_sets(
    path: Path,
    reference: Path,
    extractor: Extractor,
    *,
    out: Path,
    on_step: OnStage = lambda what, done, total: None,
) -> Evaluation:
    """Score a set of images by another.

    Args:
        path: a folder that `sample` wrote, a folder of PNGs, or an .npz.
        reference: the images to compare with, likewise.
        extractor: makes the features of both.
        out: folder for the result and for features, which a later call reuses.
        on_step: called with (what is measured, done, total).
    """
    folders.check_outputs([out / RECORD], [file for file in (path, reference) if file.is_file()])
    images = open_images(path)
    row = scores.compare_sets(images, open_images(reference, images.shape), extractor, out / "features", on_step)
    return write_evaluation(out, {path.name: row}, {})


def evaluate_engines(
    files: Sequence[Path],
    extractor: Extractor,
    drawing: DrawingOptions,
    *,
    data: Path | None = None,
    model: LoadedModel | None = None,
    on_step: OnStage = lambda what, done, total: None,
) -> Evaluation:
    """Draw with each engine and with the float network from the same noise, and score all of the images.

    Args:
        files: engine files of one model and one sampler.
        extractor: makes features.
        drawing: how many images, from which seeds, and where to.
        data: .npz of real images as the reference; None for twice as many images of the float network, from other
            noise.
        model: the float model; loaded again by the engines' records if None.
        on_step: called with (what is drawn or measured, done, total).

    Raises:
        GaqError: engines of different models or samplers, or what `sample_shards` raises.
    """
    opened = {name: replace(file, gpu=drawing.gpu) for name, file in _open(files).items()}
    first = next(iter(opened.values()))
    origin = record_of(first).provenance
    model = find_model(origin, model, first.path.parent, drawing.device)
    taken = [file for engine in opened.values() for file in files_of(engine.path)]
    written = [drawing.out / RECORD, *files_of(drawing.out / FLOAT)]
    folders.check_outputs(written, [*taken, *files_of_model(model), *([] if data is None else [data])])
    exact = _build_exact(first, model, drawing.out)
    float_images = _draw("float", exact.path, drawing, on_step)
    reference = _reference(exact, drawing, on_step) if data is None else open_images(data, session.image_shape(exact))
    cache = drawing.out / "features"
    score = partial(scores.compare_sets, reference=reference, extractor=extractor, cache=cache, on_step=on_step)
    rows = {"float": score(float_images)}
    steps = {}
    for name, file in opened.items():
        images = _draw(name, file.path, drawing, on_step)
        rows[name] = [*score(images), *scores.compare_pairs(images, float_images)]
        steps[name] = _compare_noise(file, model, drawing.seed)
    return write_evaluation(drawing.out, rows, steps)


def _open(files: Sequence[Path]) -> dict[str, EngineFile]:
    """Return engine files by name; raise GaqError if their images could not be compared."""
    opened = {file.name.removesuffix(".plan"): engines.load_engine_file(file) for file in files}
    if len(opened) != len(files):
        raise GaqError(f"Two of these engines have the same name, {[str(file) for file in files]}: rename one.")
    for file in opened.values():
        session.require_pictures(file)
    origins = [record_of(file).provenance for file in opened.values()]
    specs = {str(origin.sampler) for origin in origins}
    if len(specs) != 1 or len({origin.fingerprint for origin in origins}) != 1:
        raise GaqError(
            f"These engines are of different models or samplers ({sorted(specs)}); evaluate them one by one."
        )
    if any(origin.conditioning != origins[0].conditioning for origin in origins):
        raise GaqError("These engines have different conditioning or guidance; evaluate them one by one.")
    return opened


def _build_exact(file: EngineFile, model: LoadedModel, folder: Path) -> EngineFile:
    """Build an engine of the float network."""
    # By the same backend, so that its images differ from the quantized ones by quantization alone.
    config = EngineConfig(backend=file.backend, gpu=file.gpu)
    return build_float(model, folder / FLOAT, sampler=record_of(file).provenance.sampler, config=config)


def _compare_noise(file: EngineFile, model: LoadedModel, first: int) -> Mapping[str, Sequence[float]]:
    """Return the SQNR of an engine's predicted noise at each step, on images from seed `first` on."""
    # No more trajectories than the engine's largest batch, and no fewer than its smallest.
    seeds = range(first, first + max(file.batch[0], min(TRAJECTORIES, file.batch[2])))
    sampling = model.sampling(record_of(file).provenance.sampler)
    with session.open_engines(file) as engine:
        denoiser = session.denoiser_for(engine, file, seeds)
        return noise_sqnr.along_both(denoiser, bind(model.network, model.conditioning, seeds), seeds, sampling)


def _draw(name: str, engine: Path, drawing: DrawingOptions, on_step: OnStage) -> ImageSet:
    """Draw with one engine to a folder of its name."""
    folder = drawing.out / "images" / name
    sample_shards(
        engine,
        num=drawing.num,
        seed=drawing.seed,
        out=folder,
        shard=min(SHARD, drawing.num),
        workers=drawing.workers,
        ray=drawing.ray,
        gpu=drawing.gpu,
        on_images=partial(on_step, f"drawing ({name})"),
    )
    return open_images(folder)


def _reference(exact: EngineFile, drawing: DrawingOptions, on_step: OnStage) -> ImageSet:
    """Draw the float network's images from other noise; a floor needs two sets of this size, hence twice as many."""
    # The seeds after those of the drawing, so that the two sets share no image.
    other = replace(drawing, num=2 * drawing.num, seed=drawing.seed + drawing.num)
    return _draw("float, other noise", exact.path, other, on_step)


def write_evaluation(out: Path, rows: Rows, steps: StepRows) -> Evaluation:
    """Write scores and SQNR to a folder.

    Raises:
        GaqError: scores of different rows depend on different things.
    """
    every_score = [score for row in rows.values() for score in row]
    left_out = sorted({score.context[LEFT_OUT] for score in every_score if LEFT_OUT in score.context})
    for group in scores.groups(rows):
        scores.table(group)  # raises before anything is written
    record: dict[str, Any] = {
        **command_and_versions(),
        "libraries": versions(LIBRARIES),  # the metrics are theirs
        "rows": {name: [score.to_json() for score in row] for name, row in rows.items()},
        "steps": steps,
        "left out": left_out,
    }
    write_atomically(out / RECORD, signed(record))
    return Evaluation(rows=rows, steps=steps, left_out=left_out, path=out / RECORD)


def read_evaluation(folder: Path) -> Evaluation:
    """Read the evaluation in a folder; raise CalibError or GaqError if there is none, or none of this version."""
    path = folder / RECORD
    advice = "Run `gaq-export evaluate`"
    record = read_signed(_Record, path, advice, others=True)
    for name, row in record.rows.items():
        for score in row:
            where = f"{path}, {score.metric} of {name}"
            check_record(scores.ShownContext, dict(score.context), where, advice, others=True)
    for group in scores.groups(record.rows):
        scores.table(group)
    return Evaluation(rows=record.rows, steps=record.steps, left_out=record.left_out, path=path)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Of `evaluation.json`, what other commands read."""

    rows: Annotated[dict[str, Annotated[tuple[Score, ...], Field(min_length=1)]], Field(min_length=1)]
    steps: dict[str, dict[str, tuple[float, ...]]]
    left_out: Annotated[tuple[str, ...], Field(alias="left out")]
