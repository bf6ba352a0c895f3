"""Does it still draw the same pictures? Scores, each with all that it depends on; others are not compared with it.

    sets     a set of images against another, by features (`feature_metrics`): how alike are they as a whole?
    pairs    images against those of the float network from the same noise: PSNR, SSIM, LPIPS

The predicted noise is compared in `noise_sqnr`. A Frechet distance between two sets of the same kind is not 0, and the
fewer images there are the larger it is. So each comes with its floor, the distance of as many images of the reference
to its others, and with a bootstrap interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib.errors import CalibError
from calib.files import read_kept, write_checked
from calib.records import Count
from calib.sqnr import EQUAL_DB
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_metrics, frechet
from gaq_export.evaluation.feature_extractors import BATCH, Extractor
from gaq_export.evaluation.feature_metrics import METRICS, Features
from gaq_export.evaluation.image_sets import ImageSet
from gaq_export.images import psnr
from gaq_export.quantize.noise_sqnr import OnStage

WIDE = 256  # features: a bootstrap of wider ones takes minutes, so it gets fewer draws
BOOTSTRAP_DRAWS = 200
BOOTSTRAP_DRAWS_WIDE = 20
PAIR_METRICS = ("psnr", "psnr_low", "ssim", "lpips")
ROW_CONTEXT = ("images_sha256", "engine_sha256", "bits", "backend")  # what the rows of one table may differ in
LEFT_OUT = "left out"  # key of a context: a metric that could not be measured, and why
NAMES = {
    "sfd": "spatial distance",
    "score": "Inception score",
    "kd": "kernel distance x 1000",
    "precision": "precision",
    "recall": "recall",
    "psnr": "PSNR, median dB",
    "psnr_low": "PSNR, 5th percentile dB",
    "ssim": "SSIM, mean",
    "lpips": "LPIPS, mean",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured number.

    Attributes:
        metric: one of `feature_metrics.METRICS`, or of PAIR_METRICS.
        name: of the metric, for people.
        value: the number.
        low: lower end of a 95 % interval, None if there is no interval.
        high: its upper end, likewise.
        floor: the same distance of as many images of the reference itself; None for metrics that have no floor.
        context: everything else that the number depends on, JSON values.
    """

    metric: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    context: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ShownContext:
    """Of the context of a score, what pages show; None where the score has no such thing."""

    images: Count | None = None
    seeds: tuple[int, int] | None = None
    sampler: SamplerSpec | None = None
    exact_sha256: str | None = None
    features: str | None = None
    features_sha256: str | None = None
    reference: str | None = None
    reference_sha256: str | None = None
    reference_images: Count | None = None
    floor_images: int | None = None
    engine_sha256: str | None = None


def features_of(images: ImageSet, extractor: Extractor, cache: Path) -> Features:
    """Return the features of a set, stored in `cache` under the hashes of its pixels and of the network's weights."""
    path = cache / f"features-{images.sha256[:16]}-{extractor.name}-{extractor.sha256[:16]}.safetensors"
    names = tuple(field.name for field in fields(Features))

    def parse(header: dict[str, str], tensors: dict[str, Tensor]) -> Features:
        if tensors.keys() != set(names) or any(len(tensor) != images.count for tensor in tensors.values()):
            raise CalibError(f"{path} does not hold the features of {images.count} images.")
        return Features(**tensors)

    kept = read_kept(path, parse)
    if kept is None:
        parts = [extractor(batch) for batch in images.batches(BATCH)]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        write_checked(path, tensors)
        kept = Features(**tensors)
    return kept


def compare_sets(
    images: ImageSet,
    reference: ImageSet,
    extractor: Extractor,
    cache: Path,
    on_step: OnStage = lambda what, done, total: None,
) -> list[Score]:
    """Score a set of images by the distance of their features to those of a reference.

    Args:
        images: the images.
        reference: real images, or the float network's from other noise.
        extractor: makes the features.
        cache: folder that stores features.
        on_step: called with (what is measured, metrics done, metrics in all).

    Raises:
        GaqError: fewer than two images, or a feature network that cannot be loaded.
    """
    if min(images.count, reference.count) < 2:
        raise GaqError(
            f"Found {images.count} images to compare with {reference.count}; a spread needs at least 2 of each."
        )
    names = NAMES | {"fd": extractor.distance}
    if "FID" not in extractor.distance:
        names["score"] = "class score"  # only Inception's logits give the Inception score

    def report_step(metric: str) -> None:
        on_step(f"evaluating: {names[metric]}", METRICS.index(metric), len(METRICS))

    on_step("evaluating: features", 0, len(METRICS))
    a, b = (features_of(part, extractor, cache) for part in (images, reference))
    report_step("fd")
    size = min(images.count, reference.count // 2)  # a floor needs as many images again on the other side
    context = _context_of(images) | _reference_context(reference, extractor) | {"floor_images": size}
    distance = _frechet_score(a.pooled, b.pooled, names["fd"], context)
    values = feature_metrics.measure(METRICS[1:], a, b, report_step)
    return [distance, *(Score(metric=m, name=names[m], value=value, context=context) for m, value in values.items())]


def _frechet_score(features: Tensor, reference: Tensor, name: str, context: Mapping[str, Any]) -> Score:
    """Return the Frechet distance of features (N, D) to a reference's, with its interval and its floor."""
    draws = BOOTSTRAP_DRAWS_WIDE if features.shape[1] > WIDE else BOOTSTRAP_DRAWS
    interval = feature_metrics.interval(features, reference, draws)
    size = context["floor_images"]
    return Score(
        metric="fd",
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        floor=feature_metrics.floor(reference, size) if size > 1 else None,  # one image has no covariance
        context={**context, "bootstrap_draws": draws},
    )


def compare_pairs(images: ImageSet, exact: ImageSet) -> list[Score]:
    """Score images by the float network's from the same noise, pair by pair.

    Args:
        images: of a quantized network.
        exact: of the float network, from the same seeds.

    Raises:
        GaqError: the sets differ in number, size or seeds.
    """
    if (images.count, images.shape) != (exact.count, exact.shape):
        raise GaqError(
            f"Pairs need as many images of one size: {images.name} has {images.count} of {images.shape}, {exact.name} "
            f"{exact.count} of {exact.shape}."
        )
    if images.recorded.get("seed") != exact.recorded.get("seed"):
        raise GaqError(f"{images.name} and {exact.name} are from different noise: their first seeds differ.")
    context = _context_of(images) | {"exact_sha256": exact.sha256}
    decibels: list[float] = []
    similarities: list[float] = []
    distances: list[float] = []
    perceptual = None
    try:  # LPIPS downloads VGG's weights; without them the other scores are still worth having
        perceptual = _lpips()
    except GaqError as error:
        context |= {LEFT_OUT: str(error)}
    for a, b in zip(images.batches(BATCH), exact.batches(BATCH), strict=True):
        # Equal images have infinite PSNR, which JSON cannot hold.
        decibels += psnr(frechet.pixels(a), frechet.pixels(b)).clamp(max=EQUAL_DB).tolist()
        similarities += [_ssim(x, y) for x, y in zip(a, b, strict=True)]
        distances += perceptual(a, b) if perceptual is not None else []
    values = {
        "psnr": float(np.median(decibels)),
        "psnr_low": float(np.quantile(decibels, 0.05)),
        "ssim": float(np.mean(similarities)),
    }
    if distances:
        values["lpips"] = float(np.mean(distances))
    return [Score(metric=m, name=NAMES[m], value=value, context=context) for m, value in values.items()]


def groups(rows: Mapping[str, Sequence[Score]]) -> list[dict[str, list[Score]]]:
    """Split scores into those of sets and of pairs, a table each, since the float network has no pairs."""
    parts = []
    for pairs in (False, True):
        part = {name: [s for s in scores if (s.metric in PAIR_METRICS) == pairs] for name, scores in rows.items()}
        part = {name: scores for name, scores in part.items() if scores}
        if part:
            parts.append(part)
    return parts


def table(rows: Mapping[str, Sequence[Score]]) -> tuple[list[str], list[list[str]]]:
    """Return head and body of a table, one row for each set of scores.

    Raises:
        GaqError: two rows differ in what their scores depend on, so that they cannot be compared.
    """
    first, *others = rows
    for other in others:
        for a, b in zip(rows[first], rows[other], strict=False):
            _check_comparable(first, a, other, b)
    head = ["", *(score.name for score in rows[first])]
    return head, [[name, *map(_text, scores)] for name, scores in rows.items()]


def _check_comparable(first: str, a: Score, other: str, b: Score) -> None:
    ours, theirs = ({k: v for k, v in score.context.items() if k not in ROW_CONTEXT} for score in (a, b))
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different or a.metric != b.metric:
        what = different[0] if different else "metric"
        raise GaqError(
            f"{first!r} and {other!r} cannot be compared in one table: {what} is {ours.get(what)!r} and "
            f"{theirs.get(what)!r}."
        )


def mean_db(values: Sequence[float]) -> float:
    """Return the mean of the values that are finite."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite)


def _text(score: Score) -> str:
    text = f"{score.value:.4g}"
    if score.low is not None and score.high is not None:
        text += f" [{score.low:.3g}, {score.high:.3g}]"
    return text if score.floor is None else f"{text}, floor {score.floor:.3g}"


def _context_of(images: ImageSet) -> dict[str, Any]:
    """Return what scores depend on as far as the evaluated images go."""
    recorded = images.recorded
    context = {"images": images.count, "images_sha256": images.sha256}
    if recorded:
        first = recorded["seed"]
        context |= {"seeds": [first, first + images.count - 1]}
        keys = ("model", "sampler", "bits", "backend", "engine_sha256")
        context |= {key: recorded[key] for key in keys if key in recorded}
    return context


def _reference_context(reference: ImageSet, extractor: Extractor) -> dict[str, Any]:
    """Return what scores depend on beside the evaluated images."""
    return {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_images": reference.count,
    }


def _ssim(a: Tensor, b: Tensor) -> float:
    """Return the structural similarity of two images (C, H, W) uint8, Gaussian windows, as Wang et al. 2004."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise GaqError(f"scikit-image cannot be loaded ({error}): pip install 'gaq-export[evaluate]'.") from error
    similarity: Callable[..., float] = structural_similarity
    # The paper's window; scikit-image's defaults are another one.
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(similarity(a.numpy(), b.numpy(), channel_axis=0, **settings))


def _lpips() -> Callable[[Tensor, Tensor], list[float]]:
    """Return the measure of LPIPS (Zhang et al. 2018, VGG16); raise GaqError if its weights cannot be loaded."""
    try:
        network = feature_metrics.library("sample_similarity_lpips").SampleSimilarityLPIPS("lpips-vgg16")
    except Exception as error:  # the download and the loading raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise GaqError(f"LPIPS, since its weights cannot be loaded ({reason})") from error

    def measure(a: Tensor, b: Tensor) -> list[float]:
        pair = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (a, b))  # VGG takes three channels
        values: list[float] = network(*pair).flatten().tolist()
        return values

    return measure
