"""Evaluations: of engines, of sets of images, and the file that one leaves."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from calib.errors import CalibError
from calib.records import signed
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation import evaluate, feature_extractors, feature_metrics, frechet, scores
from gaq_export.evaluation.evaluate import DrawingOptions
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel

needs_libraries = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None or importlib.util.find_spec("skimage") is None,
    reason="torch-fidelity or scikit-image is not installed",
)


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS would fetch half a gigabyte."""

    def absent() -> None:
        raise GaqError("LPIPS, since this is a test")

    monkeypatch.setattr(scores, "_lpips", absent)


@needs_libraries
def test_engines_are_evaluated_beside_the_float_network(
    tiny_step_engine: EngineFile, tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    torch.save(frechet.ResNet56().state_dict(), tmp_path / "resnet56.th")
    network = feature_extractors.find_extractor(f"resnet56={tmp_path / 'resnet56.th'}")
    drawing = DrawingOptions(num=8, out=tmp_path / "out")
    progress: list[tuple[str, int, int]] = []
    evaluation = evaluate.evaluate_engines(
        [tiny_step_engine.path], network, drawing, model=tiny_model, on_step=lambda *words: progress.append(words)
    )
    assert list(evaluation.rows) == ["float", "unet"]
    assert [f.metric for f in evaluation.rows["unet"]] == [*feature_metrics.METRICS, "psnr", "psnr_low", "ssim"]
    record = json.loads(evaluation.path.read_text())
    assert record["rows"]["unet"][0]["context"]["seeds"] == [0, 7]
    assert record["rows"]["unet"][0]["context"]["reference_images"] == 16
    assert record["left out"] == ["LPIPS, since this is a test"]
    assert len(record["steps"]["unet"]["float trajectory"]) == 5
    drawn = {what for what, _, _ in progress if what.startswith("drawing")}
    assert drawn == {"drawing (float)", "drawing (float, other noise)", "drawing (unet)"}
    assert [what for what, _, _ in progress if what.startswith("evaluating")][-2:] == [
        "evaluating: kernel distance x 1000",
        "evaluating: precision",
    ]
    before = evaluation.path.read_bytes()
    progress.clear()
    evaluate.evaluate_engines(
        [tiny_step_engine.path], network, drawing, model=tiny_model, on_step=lambda *words: progress.append(words)
    )
    assert evaluation.path.read_bytes() == before
    assert all(done == total for what, done, total in progress if what.startswith("drawing"))  # nothing was drawn again
    other = tmp_path / "other.plan"
    config = EngineConfig(backend="openvino", threads=1)
    pipeline.build_engine(folder=tiny_run, out=other, config=config, sampler=SamplerSpec(steps=6), model=tiny_model)
    with pytest.raises(GaqError, match="of different models or samplers"):
        evaluate.evaluate_engines([tiny_step_engine.path, other], network, drawing, model=tiny_model)


@needs_libraries
def test_the_command_evaluates_two_sets_and_refuses_what_it_cannot(tmp_path: Path) -> None:
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


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    context = {"images": 9, "left out": "LPIPS, since it was too large"}
    score = Score(metric="psnr", name="PSNR, median dB", value=30.0, context=context)
    written = evaluate.write_evaluation(tmp_path, {"unet": [score]}, {"unet": {"float trajectory": [20.0]}})
    read = evaluate.read_evaluation(tmp_path)
    assert (read.path, read.left_out) == (written.path, ("LPIPS, since it was too large",))
    assert (read.rows, read.steps) == ({"unet": (score,)}, {"unet": {"float trajectory": (20.0,)}})
    with pytest.raises(CalibError, match=r"Cannot read .*evaluation\.json: .*\. Run `gaq-export evaluate`"):
        evaluate.read_evaluation(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": {}},
        {"rows": {"unet": []}},
        {"rows": {"unet": [{"metric": "fd"}]}},
        {"rows": []},
        {"steps": {"unet": {"float trajectory": ["x"]}}},
        {"steps": None},
        {"left out": 3},
        {"context": {"images": "9"}},
        {"context": {"seeds": [1]}},
        {"context": {"sampler": {"name": "ddjm"}}},
        {"context": {"exact_sha256": 3}},
        {"context": []},
    ],
)
def test_an_evaluation_of_another_form_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    score = Score(metric="psnr", name="PSNR, median dB", value=30.0, context={"images": 9})
    path = evaluate.write_evaluation(tmp_path, {"unet": [score]}, {}).path
    record = json.loads(path.read_text())
    if "context" in changes:
        record["rows"]["unet"][0] |= changes
    del record["record_sha256"]
    for text in (signed(record if "context" in changes else record | changes), b"[]", b"[" * 100_000, b""):
        path.write_bytes(text)
        with pytest.raises((CalibError, GaqError)) as error:
            evaluate.read_evaluation(tmp_path)
        assert "\n" not in str(error.value)


def test_an_edited_evaluation_is_one_line(tmp_path: Path) -> None:
    score = Score(metric="psnr", name="PSNR, median dB", value=30.0, context={"images": 9})
    path = evaluate.write_evaluation(tmp_path, {"unet": [score]}, {}).path
    path.write_text(path.read_text().replace("30.0", "40.0"))
    with pytest.raises(CalibError, match=r"\.json was edited since it was written .* Run `gaq-export evaluate`"):
        evaluate.read_evaluation(tmp_path)


def test_scores_that_cannot_stand_in_one_table_are_not_written(tmp_path: Path) -> None:
    rows = {
        name: [Score(metric="fd", name="FID", value=3.0, context={"images": count})]
        for name, count in (("a", 9), ("b", 10))
    }
    with pytest.raises(GaqError, match="'a' and 'b' cannot be compared in one table: images is 9 and 10"):
        evaluate.write_evaluation(tmp_path, rows, {})
    assert not (tmp_path / "evaluation.json").exists()
