"""Distances between two sets of images by their features, through torch-fidelity, and their intervals.

    fd         Frechet distance of the features (Heusel et al. 2017); with Inception's it is FID
    sfd        the same of spatial features (Nash et al. 2021); with Inception's it is sFID
    score      exp of the mean divergence of each image's classes from all images' (Salimans et al. 2016)
    kd         kernel distance, x 1000, cubic kernel, unbiased (Binkowski et al. 2018); with Inception's it is KID
    precision, recall    shares of one set within the reach of the other's third neighbours (Kynkaanniemi et al. 2019)

torch-fidelity imports torchvision for feature networks that are not used here. Where torchvision cannot be imported (a
build for CUDA beside a torch for CPUs, for example), empty modules stand in for it during that import.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet

SEED, SUBSETS, SUBSET = 2020, 100, 1000  # of kd, torch-fidelity's; subsets of small sets are half of their images
SPLITS = 10  # of score
NEIGHBOURS = 3
METRICS = ("fd", "sfd", "score", "kd", "precision", "recall")
_ABSENT = ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms")


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of N images.

    Attributes:
        pooled: (N, D) float32.
        logits: (N, K) float32, scores of classes.
        spatial: (N, S) float32, features of places in the image.
    """

    pooled: Tensor
    logits: Tensor
    spatial: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def take(self, index: Tensor) -> "Features":
        """Return the features of some of the images."""
        return Features(pooled=self.pooled[index], logits=self.logits[index], spatial=self.spatial[index])


class _Empty(ModuleType):
    """A module that has a class of any name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})


@contextmanager
def _torchvision() -> Iterator[None]:
    """Make `import torchvision` work inside the block."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        # A failed import leaves the submodules that had loaded, which would mix with the stand-ins.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        yield
        return
    # torch-fidelity subclasses some of torchvision's classes while it is imported, so modules alone would not do.
    stand_ins = {name: _Empty(name) for name in (*_ABSENT, "torchvision.transforms.functional")}
    for module in stand_ins.values():
        module.__path__ = []  # makes a package of it, so that its submodules can be imported
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def library(module: str) -> Any:
    """Return a module of torch-fidelity; raise GaqError if it is not installed."""
    with _torchvision():
        try:
            return importlib.import_module(f"torch_fidelity.{module}")
        except ImportError as error:
            raise GaqError(f"torch-fidelity cannot be loaded ({error}): pip install 'gaq-export[evaluate]'.") from error


def measure(
    metrics: Sequence[str],
    images: Features,
    reference: Features,
    on_metric: Callable[[str], None] = lambda metric: None,
) -> dict[str, float]:
    """Return some of METRICS.

    Args:
        metrics: which ones.
        images: features of the images that are evaluated.
        reference: features of the images that they should be like.
        on_metric: called with the metric that is measured next.

    Raises:
        GaqError: torch-fidelity is not installed.
    """
    values = dict[str, float]()
    for metric in metrics:
        if metric not in values:  # precision brings recall with it
            on_metric(metric)
            values |= _MEASURES[metric](images, reference)
    return {metric: values[metric] for metric in metrics}


def _fd(features: Tensor, reference: Tensor) -> float:
    metric = library("metric_fid")
    # float64, as in `frechet.moments`.
    statistics = [metric.fid_features_to_statistics(part.double()) for part in (features, reference)]
    return float(metric.fid_statistics_to_metric(*statistics, verbose=False)[metric.KEY_METRIC_FID])


def _score(logits: Tensor) -> float:
    metric = library("metric_isc")
    result = metric.isc_features_to_metric(logits, min(SPLITS, len(logits)), shuffle=True, rng_seed=SEED)
    return float(result[metric.KEY_METRIC_ISC_MEAN])


def _kd(features: Tensor, reference: Tensor) -> float:
    metric = library("metric_kid")
    # The unbiased estimate divides by n - 1, so a subset has two images at least.
    size = min(SUBSET, max(2, min(len(features), len(reference)) // 2))
    settings = {"kid_subsets": SUBSETS, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    result = metric.kid_features_to_metric(features.double(), reference.double(), **settings)
    return 1000 * float(result[metric.KEY_METRIC_KID_MEAN])


def _precision_recall(images: Features, reference: Features) -> dict[str, float]:
    """Return both: each needs the neighbours within the reference, which takes minutes for 60 000 images."""
    settings = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
    result = library("metric_prc").prc_features_to_metric(images.pooled, reference.pooled, **settings)
    return {name: float(result[name]) for name in ("precision", "recall")}


_MEASURES: Mapping[str, Callable[[Features, Features], dict[str, float]]] = {
    "fd": lambda images, reference: {"fd": _fd(images.pooled, reference.pooled)},
    "sfd": lambda images, reference: {"sfd": _fd(images.spatial, reference.spatial)},
    "score": lambda images, reference: {"score": _score(images.logits)},
    "kd": lambda images, reference: {"kd": _kd(images.pooled, reference.pooled)},
    "precision": _precision_recall,
    "recall": _precision_recall,
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A Frechet distance and its 95 % interval, from a bootstrap of the same images."""

    value: float
    low: float
    high: float


def interval(features: Tensor, reference: Tensor, draws: int, seed: int = 0) -> Interval:
    """Return the Frechet distance of two sets of features with a bootstrap interval.

    Both sets are drawn again, with replacement, `draws` times. A redrawn set is further from everything than the set
    itself, because it holds fewer different images. So only the spread of the redrawn distances is taken, and laid
    around the value: this is where sets of as many images would lie, and a floor can be compared with it.

    Args:
        features: of the evaluated images, (N, D).
        reference: (M, D).
        draws: of the bootstrap.
        seed: of the draws.
    """
    value = frechet.distance(frechet.moments(features), frechet.moments(reference))
    generator = torch.Generator().manual_seed(seed)
    redrawn = []
    for _ in range(draws):
        pair = [x[torch.randint(len(x), (len(x),), generator=generator)] for x in (features, reference)]
        redrawn.append(frechet.distance(*(frechet.moments(x) for x in pair)))
    # Centred, because every redrawn distance is too large by about the same amount.
    low, high = np.quantile(np.array(redrawn) - np.mean(redrawn), (0.025, 0.975))
    return Interval(value=value, low=max(0.0, value + float(low)), high=value + float(high))


def floor(reference: Tensor, size: int, splits: int = 5, seed: int = 0) -> float:
    """Return the Frechet distance of `size` images of the reference to its other images, mean over random splits.

    Args:
        reference: (M, D) features; M at least twice `size`.
        size: as many as the images that are evaluated.
        splits: how many.
        seed: of the splits.
    """
    if len(reference) < 2 * size:
        raise GaqError(f"A floor at {size} images needs {2 * size}; found {len(reference)}.")
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    for _ in range(splits):
        order = torch.randperm(len(reference), generator=generator)  # disjoint parts: no image is its own neighbour
        parts = reference[order[:size]], reference[order[size:]]
        values.append(frechet.distance(*(frechet.moments(part) for part in parts)))
    return float(np.mean(values))
