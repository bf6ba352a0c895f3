"""Draw with engines and judge what they draw, or judge images that are there; write everything to one JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import engines
from calib.files import write_atomically
from engines import EngineConfig
from engines.machine import versions
from gaq_export.deploy import session
from gaq_export.deploy.build import build_float
from gaq_export.diffusion.conditioning import bind
from gaq_export.errors import GaqError
from gaq_export.evaluation import noise_sqnr, scores
from gaq_export.evaluation.feature_extractors import Extractor
from gaq_export.evaluation.image_sets import ImageSet, open_images
from gaq_export.evaluation.scores import Figure, OnStep
from gaq_export.models import provenance
from gaq_export.models.loader import LoadedModel
from gaq_export.run import command_and_versions
from gaq_export.sampling.sample import sample_shards

RECORD = "evaluation.json"
DEFAULT = Path("evaluation")
TRAJECTORIES = 8  # on which the predicted noise is compared
LIBRARIES = ("torch-fidelity", "numpy", "scipy", "scikit-image")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures by row; per-step SQNR in dB by row and trajectory; what was left out and why."""

    rows: Mapping[str, Sequence[Figure]]
    steps: Mapping[str, Mapping[str, Sequence[float]]]
    left_out: Sequence[str]
    path: Path


def evaluate_sets(
    found: Path,
    reference: Path,
    extractor: Extractor,
    *,
    out: Path,
    on_step: OnStep = lambda what, done, total: None,
) -> Evaluation:
    """Judge images by others.

    Args:
        found: a folder that `sample` wrote, a folder of PNGs, or an .npz.
        reference: likewise.
        extractor: makes their features.
        out: folder for the result, and for features, which are kept.
        on_step: told what is measured, how much is done, of how much.
    """
    images = open_images(found)
    figures = scores.compare_sets(images, open_images(reference, images.shape), extractor, out / "features", on_step)
    return _write(out, {found.name: figures}, {})


def evaluate_engines(
    files: Sequence[Path],
    extractor: Extractor,
    *,
    num: int,
    out: Path,
    seed: int = 0,
    data: Path | None = None,
    model: LoadedModel | None = None,
    workers: int = 1,
    ray: str | None = None,
    on_step: OnStep = lambda what, done, total: None,
) -> Evaluation:
    """Draw `num` images with each engine and with the float network from the same noise, and judge all of them.

    Args:
        files: engine files of one model and one sampler.
        extractor: makes features.
        num: images each.
        out: folder for images, features and the result; the same call again goes on where it was.
        seed: of the first image.
        data: .npz of real images to judge by; twice `num` images of the float network from other noise if None.
        model: the float model; found again from the engine files if None.
        workers: processes that draw.
        ray: address of a Ray cluster that draws instead.
        on_step: told who draws or what is measured, how much is done, of how much.

    Raises:
        GaqError: engines of different models or samplers, or what `sample_shards` raises.
    """
    opened = {_label(file): engines.load_engine_file(file) for file in files}
    if len(opened) != len(files):
        raise GaqError(f"Found engines of one name among {[str(file) for file in files]}: rename one.")
    specs = {str(session.sampler_of(file, None)) for file in opened.values()}
    if len(specs) != 1 or len({file.about["model"]["fingerprint"] for file in opened.values()}) != 1:
        raise GaqError(
            f"These engines are of different models or samplers ({sorted(specs)}); evaluate them one by one."
        )
    first = next(iter(opened.values()))
    if any(file.about.get("conditions") != first.about.get("conditions") for file in opened.values()):
        raise GaqError("These engines are told different things, or with different guidance; evaluate them one by one.")
    model, spec = provenance.model_of(first.about, model, first.path.parent), session.sampler_of(first, None)
    exact = build_float(model, out / "float.plan", sampler=spec, config=EngineConfig(backend=first.backend))

    def draw(name: str, path: Path, count: int, start: int) -> ImageSet:
        folder = out / "images" / name
        sample_shards(
            path,
            num=count,
            seed=start,
            out=folder,
            shard=min(256, count),
            workers=workers,
            ray=ray,
            on_images=lambda done, total: on_step(f"drawing ({name})", done, total),
        )
        return open_images(folder)

    same = draw("float", exact.path, num, seed)
    if data is None:
        reference = draw("float, other noise", exact.path, 2 * num, seed + num)
    else:
        reference = open_images(data, session.image_shape(exact))
    judge = partial(scores.compare_sets, reference=reference, extractor=extractor, cache=out / "features")
    rows, steps = {"float": judge(same, on_step=on_step)}, {}
    for name, file in opened.items():
        drawn = draw(name, file.path, num, seed)
        rows[name] = [*judge(drawn, on_step=on_step), *scores.compare_pairs(drawn, same)]
        seeds = range(seed, seed + max(file.batch[0], min(TRAJECTORIES, file.batch[2])))
        with session.open_engines(file) as engine:
            steps[name] = noise_sqnr.along_both(
                session.noise_for(engine, file, model.schedule, seeds),
                bind(model.network, model.conditioning, seeds),
                model.schedule,
                model.shape,
                spec,
                seeds,
            )
    return _write(out, rows, steps)


def _label(file: Path) -> str:
    return file.name.removesuffix(".plan")


def _write(
    out: Path, rows: Mapping[str, Sequence[Figure]], steps: Mapping[str, Mapping[str, Sequence[float]]]
) -> Evaluation:
    left_out = sorted({f.context["left out"] for figures in rows.values() for f in figures if "left out" in f.context})
    for part in scores.groups(rows):
        scores.table(part)
    record: dict[str, Any] = {
        **command_and_versions(),
        "libraries": versions(LIBRARIES),
        "rows": {name: [figure.to_json() for figure in figures] for name, figures in rows.items()},
        "steps": steps,
        "left out": left_out,
    }
    write_atomically(out / RECORD, json.dumps(record, indent=1).encode())
    return Evaluation(rows=rows, steps=steps, left_out=left_out, path=out / RECORD)


def read_evaluation(folder: Path) -> Evaluation:
    """Read what was written to a folder; raise GaqError if it holds no evaluation."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: [Figure.from_json(figure) for figure in figures] for name, figures in record["rows"].items()}
        return Evaluation(rows=rows, steps=record["steps"], left_out=record["left out"], path=path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GaqError(f"{path} cannot be read as an evaluation ({error!r}): run `gaq-export evaluate`.") from error
