"""Figures: what they are measured against, what they depend on, and that those of different kinds are kept apart."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation import evaluate, feature_extractors, feature_metrics, frechet, scores
from gaq_export.evaluation.feature_extractors import Extractor
from gaq_export.evaluation.image_sets import ImageSet, _digest
from gaq_export.evaluation.scores import Figure
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None or importlib.util.find_spec("skimage") is None,
    reason="torch-fidelity or scikit-image is not installed",
)


def images(count: int, draw: int, name: str = "images", low: int = 0, **made: object) -> ImageSet:
    generator = torch.Generator().manual_seed(draw)
    pixels = torch.randint(low, 256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)

    def parts() -> list[Tensor]:
        return iter(torch.split(pixels, 7))

    return ImageSet(name=name, count=count, shape=(1, 32, 32), parts=parts, sha256=_digest(parts), made=made)


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
    found, reference = images(60, 1, low=90, seed=5, sampler={"steps": 9}), images(130, 2, name="real")
    figures = scores.compare_sets(found, reference, digits, tmp_path)
    assert [figure.metric for figure in figures] == ["fd", "sfd", "score", "kd", "precision", "recall"]
    again = scores.compare_sets(found, reference, digits, tmp_path)  # from kept features
    assert again == figures == scores.compare_sets(found, reference, digits, tmp_path / "fresh")
    fd = figures[0]
    features = [frechet.moments(digits(torch.cat(list(part.parts()))).pooled) for part in (found, reference)]
    assert fd.value == pytest.approx(frechet.distance(*features), rel=1e-9)
    assert fd.name == "Frechet distance (digits)"
    assert fd.low < fd.value < fd.high
    assert 0 < fd.floor < fd.value
    expected = {"images": 60, "reference_images": 130, "floor_images": 60, "seeds": [5, 64], "features": "digits"}
    assert expected.items() <= fd.context.items()
    assert fd.context["features_sha256"] == digits.sha256
    assert fd.context["sampler"] == {"steps": 9}
    assert all(figure.name != "Inception score" for figure in figures)


def test_pairs_are_compared_image_by_image() -> None:
    exact, found = images(20, 1, seed=3), images(20, 1, seed=3)
    pixels = torch.cat(list(exact.parts())).int()
    noisy = (pixels + torch.arange(20)[:, None, None, None] % 9 - 4).clamp(0, 255).to(torch.uint8)
    found = dataclasses.replace(found, parts=lambda: iter(torch.split(noisy, 3)))
    values = {figure.metric: figure.value for figure in scores.compare_pairs(found, exact)}
    expected = psnr(frechet.pixels(noisy), frechet.pixels(pixels.to(torch.uint8))).clamp(max=200)
    assert values["psnr"] == pytest.approx(float(torch.quantile(expected, 0.5)), abs=1e-4)
    assert values["psnr_low"] == pytest.approx(float(torch.quantile(expected, 0.05)), abs=1e-4)
    assert 0.9 < values["ssim"] < 1
    assert values.keys() == {"psnr", "psnr_low", "ssim"}
    same = {figure.metric: figure.value for figure in scores.compare_pairs(exact, exact)}
    assert same == {"psnr": 200.0, "psnr_low": 200.0, "ssim": 1.0}
    assert scores.compare_pairs(exact, exact)[0].context["left out"] == "LPIPS, since this is a test"
    with pytest.raises(GaqError, match="are from different noise"):
        scores.compare_pairs(exact, images(20, 1, seed=4))
    with pytest.raises(GaqError, match="Pairs need as many images of one size"):
        scores.compare_pairs(exact, images(21, 1, seed=3))


def test_figures_that_depend_on_other_things_refuse_to_stand_in_one_table() -> None:
    def row(**context: object) -> list[Figure]:
        return [Figure(metric="fd", name="FID", value=3.0, low=2.5, high=3.5, floor=1.0, context=context)]

    rows = {"a": row(images=9, engine_sha256="x"), "b": row(images=9, engine_sha256="y")}
    head, body = scores.table(rows)
    assert head == ["", "FID"]
    assert body == [["a", "3 [2.5, 3.5], floor 1"], ["b", "3 [2.5, 3.5], floor 1"]]
    for name, value in (("images", 10), ("features_sha256", "z"), ("sampler", {"steps": 3}), ("seeds", [0, 8])):
        odd = {**rows, "c": row(**{"images": 9, name: value})}
        with pytest.raises(GaqError, match=f"'a' and 'c' cannot stand in one table: {name} is"):
            scores.table(odd)


def test_engines_are_drawn_with_and_judged_beside_the_float_network(
    tiny_step_engine: EngineFile, tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    torch.save(frechet.ResNet56().state_dict(), tmp_path / "resnet56.th")
    network = feature_extractors.find_extractor(f"resnet56={tmp_path / 'resnet56.th'}")
    options = {"num": 8, "out": tmp_path / "out", "model": tiny_model}
    conditioning: list[tuple[str, int, int]] = []
    found = evaluate.evaluate_engines(
        [tiny_step_engine.path], network, **options, on_step=lambda *words: conditioning.append(words)
    )
    assert list(found.rows) == ["float", "unet"]
    assert [f.metric for f in found.rows["unet"]] == [*feature_metrics.METRICS, "psnr", "psnr_low", "ssim"]
    record = json.loads(found.path.read_text())
    assert record["rows"]["unet"][0]["context"]["seeds"] == [0, 7]
    assert record["rows"]["unet"][0]["context"]["reference_images"] == 16
    assert record["left out"] == ["LPIPS, since this is a test"]
    assert len(record["steps"]["unet"]["float trajectory"]) == 5
    drawn = {what for what, _, _ in conditioning if what.startswith("drawing")}
    assert drawn == {"drawing (float)", "drawing (float, other noise)", "drawing (unet)"}
    assert [what for what, _, _ in conditioning if what.startswith("judging")][-2:] == [
        "judging: kernel distance x 1000",
        "judging: precision",
    ]
    before = found.path.read_bytes()
    conditioning.clear()
    evaluate.evaluate_engines(
        [tiny_step_engine.path], network, **options, on_step=lambda *words: conditioning.append(words)
    )
    assert found.path.read_bytes() == before
    assert all(
        done == total for what, done, total in conditioning if what.startswith("drawing")
    )  # nothing was drawn again
    other = tmp_path / "other.plan"
    config = EngineConfig(backend="openvino", threads=1)
    pipeline.build_engine(folder=tiny_run, out=other, config=config, sampler=SamplerSpec(steps=6), model=tiny_model)
    with pytest.raises(GaqError, match="of different models or samplers"):
        evaluate.evaluate_engines([tiny_step_engine.path, other], network, **options)


def test_the_command_judges_two_sets_and_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 70)):
        np.savez(tmp_path / f"{name}.npz", images=draw.integers(0, 256, (count, 32, 32), dtype=np.uint8))
    sets = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    words = ["evaluate", *sets, "--features", "digits", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Frechet distance (digits)" in done.output
    assert "floor" in done.output
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"].keys() == {"a.npz"}
    for wrong, message in (
        (["evaluate"], "Give two sets of images, or one or more --engine."),
        (["evaluate", sets[0]], "Give two sets of images, or one or more --engine."),
        (["evaluate", *sets, "--features", "eyes"], "Unknown features 'eyes'."),
        (["evaluate", sets[0], str(tmp_path), "--features", "digits"], "holds no images"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2
        assert refused.output.count("\n") == 1
        assert message in refused.output
