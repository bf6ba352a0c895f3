"""Scores: what they are measured against, what they depend on, and that those of different kinds stay apart."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.records import parse_record
from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_extractors, frechet, scores
from gaq_export.evaluation.feature_extractors import Extractor
from gaq_export.evaluation.image_sets import ImageSet, _digest
from gaq_export.evaluation.scores import Score
from gaq_export.images import psnr

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None or importlib.util.find_spec("skimage") is None,
    reason="torch-fidelity or scikit-image is not installed",
)


def images(count: int, draw: int, name: str = "images", low: int = 0, **made: object) -> ImageSet:
    generator = torch.Generator().manual_seed(draw)
    pixels = torch.randint(low, 256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)

    def parts() -> list[Tensor]:
        return iter(torch.split(pixels, 7))

    return ImageSet(name=name, count=count, shape=(1, 32, 32), parts=parts, sha256=_digest(parts), recorded=made)


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS would fetch half a gigabyte."""

    def absent() -> None:
        raise GaqError("LPIPS, since this is a test")

    monkeypatch.setattr(scores, "_lpips", absent)


@pytest.fixture(scope="module")
def digits() -> Extractor:
    return feature_extractors.find_extractor("digits")


def test_two_runs_agree_to_the_digit_and_say_what_they_depend_on(digits: Extractor, tmp_path: Path) -> None:
    evaluated, reference = images(60, 1, low=90, seed=5, sampler={"steps": 9}), images(130, 2, name="real")
    row = scores.compare_sets(evaluated, reference, digits, tmp_path)
    assert [score.metric for score in row] == ["fd", "sfd", "score", "kd", "precision", "recall"]
    again = scores.compare_sets(evaluated, reference, digits, tmp_path)  # from kept features
    assert again == row == scores.compare_sets(evaluated, reference, digits, tmp_path / "fresh")
    fd = row[0]
    features = [frechet.moments(digits(torch.cat(list(part.parts()))).pooled) for part in (evaluated, reference)]
    assert fd.value == pytest.approx(frechet.distance(*features), rel=1e-9)
    assert fd.name == "Frechet distance (digits)"
    assert fd.low < fd.value < fd.high
    assert 0 < fd.floor < fd.value
    expected = {"images": 60, "reference_images": 130, "floor_images": 60, "seeds": [5, 64], "features": "digits"}
    assert expected.items() <= fd.context.items()
    assert fd.context["features_sha256"] == digits.sha256
    assert fd.context["sampler"] == {"steps": 9}
    assert all(score.name != "Inception score" for score in row)


def test_pairs_are_compared_image_by_image() -> None:
    exact, quantized = images(20, 1, seed=3), images(20, 1, seed=3)
    pixels = torch.cat(list(exact.parts())).int()
    noisy = (pixels + torch.arange(20)[:, None, None, None] % 9 - 4).clamp(0, 255).to(torch.uint8)
    quantized = dataclasses.replace(quantized, parts=lambda: iter(torch.split(noisy, 3)))
    values = {score.metric: score.value for score in scores.compare_pairs(quantized, exact)}
    expected = psnr(frechet.pixels(noisy), frechet.pixels(pixels.to(torch.uint8))).clamp(max=200)
    assert values["psnr"] == pytest.approx(float(torch.quantile(expected, 0.5)), abs=1e-4)
    assert values["psnr_low"] == pytest.approx(float(torch.quantile(expected, 0.05)), abs=1e-4)
    assert 0.9 < values["ssim"] < 1
    assert values.keys() == {"psnr", "psnr_low", "ssim"}
    same = {score.metric: score.value for score in scores.compare_pairs(exact, exact)}
    assert same == {"psnr": 200.0, "psnr_low": 200.0, "ssim": 1.0}
    assert scores.compare_pairs(exact, exact)[0].context["left out"] == "LPIPS, since this is a test"
    with pytest.raises(GaqError, match="are from different noise"):
        scores.compare_pairs(exact, images(20, 1, seed=4))
    with pytest.raises(GaqError, match="Pairs need as many images of one size"):
        scores.compare_pairs(exact, images(21, 1, seed=3))


def test_scores_that_depend_on_other_things_refuse_to_stand_in_one_table() -> None:
    def row(**context: object) -> list[Score]:
        return [Score(metric="fd", name="FID", value=3.0, low=2.5, high=3.5, floor=1.0, context=context)]

    rows = {"a": row(images=9, engine_sha256="x"), "b": row(images=9, engine_sha256="y")}
    head, body = scores.table(rows)
    assert head == ["", "FID"]
    assert body == [["a", "3 [2.5, 3.5], floor 1"], ["b", "3 [2.5, 3.5], floor 1"]]
    for name, value in (("images", 10), ("features_sha256", "z"), ("sampler", {"steps": 3}), ("seeds", [0, 8])):
        odd = {**rows, "c": row(**{"images": 9, name: value})}
        with pytest.raises(GaqError, match=f"'a' and 'c' cannot be compared in one table: {name} is"):
            scores.table(odd)


def test_a_mean_leaves_out_what_is_not_finite() -> None:
    assert scores.mean_db([10.0, float("inf"), 20.0]) == 15.0


def test_scores_survive_json() -> None:
    score = Score(metric="fd", name="FID", value=3.0, low=2.5, high=3.5, floor=1.0, context={"images": 9})
    assert parse_record(Score, json.dumps(score.to_json()), "here", "Again") == score


def test_a_set_of_one_image_has_no_score(digits: Extractor, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="Found 1 images to compare with 130; a spread needs at least 2 of each"):
        scores.compare_sets(images(1, 1), images(130, 2), digits, tmp_path)
