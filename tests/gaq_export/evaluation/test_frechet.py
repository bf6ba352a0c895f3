"""Frechet distance, against cases with a closed form; the digit classifier, trained once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet
from gaq_export.evaluation.frechet import Moments


def gaussian(mean: list[float], deviations: list[float], angle: float = 0.0) -> Moments:
    """Return a Gaussian in the plane with these deviations along axes turned by `angle`."""
    c, s = np.cos(angle), np.sin(angle)
    axes = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    variances = torch.tensor(deviations, dtype=torch.float64).square().diag()
    return Moments(mean=torch.tensor(mean, dtype=torch.float64), covariance=axes @ variances @ axes.T)


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_two_gaussians_with_the_same_axes_differ_by_means_and_deviations(angle: float) -> None:
    a, b = gaussian([1.0, 2.0], [3.0, 0.5], angle), gaussian([1.5, 0.0], [1.0, 2.5], angle)
    assert frechet.distance(a, b) == pytest.approx(0.25 + 4.0 + 4.0 + 4.0)


def test_axes_that_do_not_agree_follow_the_closed_form_in_the_plane() -> None:
    """In two dimensions tr(M^1/2) = sqrt(tr M + 2 sqrt(det M)) for M = S_a S_b."""
    a, b = gaussian([0.0, 0.0], [3.0, 0.5]), gaussian([0.0, 0.0], [1.0, 2.5], 0.7)
    product = a.covariance @ b.covariance
    overlap = torch.sqrt(product.trace() + 2 * torch.sqrt(torch.det(product)))
    expected = float(a.covariance.trace() + b.covariance.trace() - 2 * overlap)
    assert frechet.distance(a, b) == pytest.approx(expected)
    assert frechet.distance(b, a) == pytest.approx(expected)


def test_a_direction_without_any_variance_does_no_harm() -> None:
    flat = gaussian([0.0, 0.0], [2.0, 0.0], 0.3)
    assert frechet.distance(flat, flat) == pytest.approx(0, abs=1e-6)


def test_features_that_only_moved_are_as_far_as_they_moved() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = features + torch.tensor([1.0, 0.0, 2.0, 0.0])
    assert frechet.distance(frechet.moments(features), frechet.moments(moved)) == pytest.approx(5)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """256 pictures of 28x28 with a bright quarter, which is their class; half of them are the test set."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    images = rng.integers(0, 100, (256, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[14 * (label // 2) :, 14 * (label % 2) :][:14, :14] += 120
    path = tmp_path / "digits.npz"
    train, test = slice(128), slice(128, None)
    np.savez(
        path,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )
    return path


def test_pictures_are_padded_evenly_with_black(digits: Path) -> None:
    images = frechet.load_images(digits, "test", (1, 32, 32)).images
    assert images.shape == (128, 1, 32, 32)
    with np.load(digits) as stored:
        assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), stored["test_images"])
    assert int(images.sum()) == int(images[:, :, 2:30, 2:30].sum())


def test_pictures_of_another_shape_are_an_error(digits: Path) -> None:
    with pytest.raises(GaqError, match=r"uint8 images \(28, 28, 1\); the model draws \(3, 32, 32\)"):
        frechet.load_images(digits, "test", (3, 32, 32))


def test_the_classifier_is_trained_once_and_learns(digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(frechet, "EPOCHS", 40)
    path = tmp_path / "classifier.safetensors"
    trained = frechet.digit_net(path, digits, (1, 32, 32))
    test = frechet.load_images(digits, "test", (1, 32, 32))
    features = frechet.features(trained, test.images)
    assert features.shape == (128, 64)
    assert frechet.accuracy(trained, features, test.labels) > 0.9
    digits.unlink()
    again = frechet.digit_net(path, digits, (1, 32, 32))
    assert torch.equal(frechet.features(again, test.images), features)
