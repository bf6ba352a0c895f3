"""Does it still draw the same pictures? Every figure with what it depends on, and none beside one that differs in that.

    sets     a set of images against another, by features (`feature_metrics`): how alike are they as a whole?
    pairs    images against those of the float network from the same noise: PSNR, SSIM, LPIPS
    steps    SQNR of the predicted noise at each step, where the float network comes by and where the quantized one does

A Frechet distance between two sets of the same kind is not 0, and less so the fewer images there are. So each comes
with its floor, the distance of as many images of the reference to its others, and with a bootstrap interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from calib.files import read_safetensors, write_atomically
from calib.sqnr import EQUAL_DB
from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_metrics, frechet
from gaq_export.evaluation.feature_extractors import BATCH, Extractor
from gaq_export.evaluation.feature_metrics import Features
from gaq_export.evaluation.image_sets import ImageSet
from gaq_export.images import psnr

OnStep = Callable[[str, int, int], None]

DRAWS = {False: 200, True: 20}  # of a bootstrap, by whether features are wider than
WIDE = 256
PAIRS = ("psnr", "psnr_low", "ssim", "lpips")
OWN = ("images_sha256", "engine_sha256", "bits", "backend")  # conditions that a row is about, and differ
SHOWN = {
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
class Figure:
    """One number.

    Attributes:
        metric: one of `feature_metrics.METRICS`, or of a pair.
        name: what to call it.
        value: the number.
        low: of a 95 % interval, None if it has none.
        high: likewise.
        floor: what as many images of the reference itself have, None if that is 0.
        conditions: what else it depends on, JSON values.
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

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; a TypeError means that it did not."""
        return cls(**record)


def features_of(images: ImageSet, extractor: Extractor, cache: Path) -> Features:
    """Return the features of a set, kept under the hashes of its pixels and of the network's weights."""
    path = cache / f"features-{images.sha256[:16]}-{extractor.name}-{extractor.sha256[:16]}.safetensors"
    if not path.is_file():
        parts = [extractor(batch) for batch in images.batches(BATCH)]
        kept = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "logits", "spatial")}
        write_atomically(path, save({name: tensor.contiguous() for name, tensor in kept.items()}))
    return Features(**read_safetensors(path)[1])


def compare_sets(
    found: ImageSet,
    reference: ImageSet,
    extractor: Extractor,
    cache: Path,
    on_step: OnStep = lambda what, done, total: None,
) -> list[Figure]:
    """Judge a set by what it should be like.

    Args:
        found: the images.
        reference: real ones, or the float network's from other noise.
        extractor: makes their features.
        cache: folder that keeps features.
        on_step: told what is measured, how much is done, of how much.

    Raises:
        GaqError: fewer than two images, or features that cannot be had.
    """
    if min(found.count, reference.count) < 2:
        raise GaqError(f"Found {found.count} images to judge by {reference.count}; 2 of each are the least.")
    names = SHOWN | {"fd": extractor.distance}
    if "FID" not in extractor.distance:
        names["score"] = "class score"

    def report_step(metric: str) -> None:
        on_step(f"judging: {names[metric]}", feature_metrics.METRICS.index(metric), len(feature_metrics.METRICS))

    on_step("judging: features", 0, len(feature_metrics.METRICS))
    a, b = (features_of(images, extractor, cache) for images in (found, reference))
    report_step("fd")
    size = min(found.count, reference.count // 2)
    context = _context_of(found) | {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_images": reference.count,
        "floor_images": size,
    }
    draws = DRAWS[a.pooled.shape[1] > WIDE]
    spread = feature_metrics.interval(a.pooled, b.pooled, draws)
    floor = feature_metrics.floor(b.pooled, size) if size > 1 else None
    figures = [
        Figure(
            metric="fd",
            name=names["fd"],
            value=spread.value,
            low=spread.low,
            high=spread.high,
            floor=floor,
            context=context | {"bootstrap_draws": draws},
        )
    ]
    for metric, value in feature_metrics.measure(feature_metrics.METRICS[1:], a, b, report_step).items():
        figures.append(Figure(metric=metric, name=names[metric], value=value, context=context))
    return figures


def compare_pairs(found: ImageSet, exact: ImageSet) -> list[Figure]:
    """Judge images by the float network's from the same noise; raise GaqError if they are not from the same."""
    if (found.count, found.shape) != (exact.count, exact.shape):
        raise GaqError(
            f"Pairs need as many images of one size: {found.name} has {found.count} of {found.shape}, {exact.name} "
            f"{exact.count} of {exact.shape}."
        )
    if found.made.get("seed") != exact.made.get("seed"):
        raise GaqError(f"{found.name} and {exact.name} are from different noise: their first seeds differ.")
    context = _context_of(found) | {"exact_sha256": exact.sha256}
    decibels, similar, lpips = list[float](), list[float](), list[float]()
    perceptual = None
    try:
        perceptual = _lpips()
    except GaqError as error:
        context |= {"left out": str(error)}
    for a, b in zip(found.batches(BATCH), exact.batches(BATCH), strict=True):
        decibels += psnr(frechet.pixels(a), frechet.pixels(b)).clamp(max=EQUAL_DB).tolist()
        similar += [_ssim(x, y) for x, y in zip(a, b, strict=True)]
        lpips += perceptual(a, b) if perceptual is not None else []
    values = {
        "psnr": float(np.median(decibels)),
        "psnr_low": float(np.quantile(decibels, 0.05)),
        "ssim": float(np.mean(similar)),
    }
    if lpips:
        values["lpips"] = float(np.mean(lpips))
    return [Figure(metric=m, name=SHOWN[m], value=value, context=context) for m, value in values.items()]


def groups(rows: Mapping[str, Sequence[Figure]]) -> list[dict[str, list[Figure]]]:
    """Return the rows' figures of sets, and those of pairs: tables of their own, since only some rows have both."""
    found = []
    for pairs in (False, True):
        part = {name: [f for f in figures if (f.metric in PAIRS) == pairs] for name, figures in rows.items()}
        part = {name: figures for name, figures in part.items() if figures}
        if part:
            found.append(part)
    return found


def table(rows: Mapping[str, Sequence[Figure]]) -> tuple[list[str], list[list[str]]]:
    """Return head and body of a table, a row for each set of figures.

    Raises:
        GaqError: two rows differ in what their figures depend on, so that they cannot be compared.
    """
    first, *others = rows
    for other in others:
        for a, b in zip(rows[first], rows[other], strict=False):
            ours, theirs = ({k: v for k, v in f.context.items() if k not in OWN} for f in (a, b))
            odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            if odd or a.metric != b.metric:
                what = odd[0] if odd else "metric"
                raise GaqError(
                    f"{first!r} and {other!r} cannot stand in one table: {what} is {ours.get(what)!r} and "
                    f"{theirs.get(what)!r}."
                )
    head = ["", *(figure.name for figure in rows[first])]
    return head, [[name, *map(_shown, figures)] for name, figures in rows.items()]


def _shown(figure: Figure) -> str:
    text = f"{figure.value:.4g}"
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low:.3g}, {figure.high:.3g}]"
    return text if figure.floor is None else f"{text}, floor {figure.floor:.3g}"


def _context_of(found: ImageSet) -> dict[str, Any]:
    made = found.made
    context = {"images": found.count, "images_sha256": found.sha256}
    if made:
        first = made["seed"]
        context |= {"seeds": [first, first + found.count - 1]}
        context |= {key: made[key] for key in ("model", "sampler", "bits", "backend", "engine_sha256") if key in made}
    return context


def _ssim(a: Tensor, b: Tensor) -> float:
    """Return the structural similarity of two images (C, H, W) uint8, Gaussian windows, as Wang et al. 2004."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise GaqError(f"scikit-image cannot be loaded ({error}): pip install 'gaq-export[evaluate]'.") from error
    similarity: Callable[..., float] = structural_similarity
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(similarity(a.numpy(), b.numpy(), channel_axis=0, **settings))


def _lpips() -> Callable[[Tensor, Tensor], list[float]]:
    """Return what measures LPIPS (Zhang et al. 2018, VGG16); raise GaqError where its weights cannot be had."""
    try:
        network = feature_metrics.library("sample_similarity_lpips").SampleSimilarityLPIPS("lpips-vgg16")
    except Exception as error:  # the download and the loading raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise GaqError(f"LPIPS, since its weights cannot be loaded ({reason})") from error

    def measure(a: Tensor, b: Tensor) -> list[float]:
        pair = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (a, b))
        values: list[float] = network(*pair).flatten().tolist()
        return values

    return measure


def mean_db(rows: Sequence[float]) -> float:
    """Return the mean over steps, of those that are finite."""
    finite = [value for value in rows if math.isfinite(value)]
    return sum(finite) / len(finite)
