"""Metrics on fixed features: torch-fidelity's are those of a plain float64 computation, and intervals cover."""

import importlib.util
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_metrics, frechet
from gaq_export.evaluation.feature_metrics import Features

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


def features(count: int, seed: int, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(99))
    pooled = torch.randn(count, 6, generator=generator) @ mixing + shift
    logits = torch.randn(count, 4, generator=generator) * 2
    return Features(
        pooled=pooled, logits=logits, spatial=pooled.repeat(1, 2) + torch.randn(count, 12, generator=generator)
    )


FOUND, REFERENCE = features(240, 1, shift=0.3), features(300, 2)


def measured(metric: str, found: Features = FOUND) -> float:
    return feature_metrics.measure([metric], found, REFERENCE)[metric]


def by_hand(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root))


def test_frechet_distances_are_those_of_a_matrix_root() -> None:
    assert measured("fd") == pytest.approx(by_hand(FOUND.pooled, REFERENCE.pooled), rel=1e-9)
    assert measured("sfd") == pytest.approx(by_hand(FOUND.spatial, REFERENCE.spatial), rel=1e-9)
    ours = frechet.distance(frechet.moments(FOUND.pooled), frechet.moments(REFERENCE.pooled))
    assert ours == pytest.approx(measured("fd"), rel=1e-9)


def test_the_kernel_distance_is_the_unbiased_sum_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_metrics, "SUBSETS", 3)
    x, y, size = FOUND.pooled.double().numpy(), REFERENCE.pooled.double().numpy(), 120  # half of the smaller set
    draw, found = np.random.RandomState(feature_metrics.SEED), []

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 6 + 1) ** 3

    for _ in range(3):
        a = x[draw.choice(len(x), size, replace=False)]
        b = y[draw.choice(len(y), size, replace=False)]
        within = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(a, a), kernel(b, b))]
        found.append(sum(within) - 2 * kernel(a, b).mean())
    assert measured("kd") == pytest.approx(1000 * float(np.mean(found)), rel=1e-9)


def test_the_score_is_that_of_its_definition() -> None:
    order = np.random.RandomState(feature_metrics.SEED).permutation(240)
    p = torch.softmax(FOUND.logits.double()[order], 1).numpy()
    scores = []
    for part in np.split(p, 10):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert measured("score") == pytest.approx(float(np.mean(scores)), rel=1e-12)


def test_precision_and_recall_count_who_is_within_whose_third_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = FOUND.pooled.double(), REFERENCE.pooled.double()

    def within(points: torch.Tensor, of: torch.Tensor) -> float:
        radius = torch.cdist(of, of).sort(1).values[:, 3]
        return float((torch.cdist(points, of) <= radius).any(1).double().mean())

    assert measured("precision") == pytest.approx(within(x, y), abs=0.01)
    assert measured("recall") == pytest.approx(within(y, x), abs=0.01)
    far = features(240, 3, shift=50.0)
    both = ["recall", "precision"]
    monkeypatch.setitem(feature_metrics._MEASURES, "precision", None)  # since one call finds both
    assert feature_metrics.measure(both, far, REFERENCE) == {"recall": 0, "precision": 0}


def test_the_interval_of_a_comparison_with_itself_contains_its_floor() -> None:
    everything = features(4000, 5).pooled
    floor = feature_metrics.floor(everything[:1000], 500)
    found = feature_metrics.interval(everything[2000:2500], everything[2500:3000], 200)
    assert found.low <= floor <= found.high
    assert found == feature_metrics.interval(everything[2000:2500], everything[2500:3000], 200)
    other = feature_metrics.interval(features(500, 6, shift=0.5).pooled, everything[2500:3000], 200)
    assert other.low > floor
    assert other.low < other.value < other.high


def test_a_floor_is_the_distance_of_a_part_to_the_rest() -> None:
    reference = features(90, 7).pooled
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    part, rest = (frechet.moments(reference[index]) for index in (order[:40], order[40:]))
    assert feature_metrics.floor(reference, 40, splits=1, seed=3) == pytest.approx(frechet.distance(part, rest))
    assert feature_metrics.floor(reference, 40) > feature_metrics.floor(features(2000, 7).pooled, 900) > 0


def test_an_interval_covers_where_as_many_other_images_would_be() -> None:
    def pair(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return features(300, 1000 + k, 0.6).pooled, features(300, 2000 + k).pooled

    mean = np.mean([frechet.distance(*map(frechet.moments, pair(k))) for k in range(100, 200)])
    found = [feature_metrics.interval(*pair(k), 60, seed=k) for k in range(20)]
    assert sum(one.low <= mean <= one.high for one in found) >= 16


def test_a_floor_needs_images_enough() -> None:
    with pytest.raises(GaqError, match="A floor at 500 images needs 1000; found 999"):
        feature_metrics.floor(torch.zeros(999, 2), 500)


def test_torchvision_is_left_as_it_was() -> None:
    before = "torchvision" in sys.modules
    feature_metrics.library("metric_fid")
    assert ("torchvision" in sys.modules) == before
