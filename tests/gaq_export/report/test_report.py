"""The report: everything of an engine on one page, in a browser as on paper, and what it refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from calib.plan import load_plan, save_plan
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.deploy.record import record_of
from gaq_export.errors import GaqError
from gaq_export.evaluation import evaluate
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel
from gaq_export.report import report, report_page
from tests.gaq_export import browser
from tests.gaq_export.outline import outline

TITLES = [
    "Does it draw the same pictures?",
    "What do the metrics say of many pictures?",
    "Does it predict the same noise?",
    "Is it smaller?",
    "What does it compute in?",
    "Is it faster?",
    "Do the sampling steps pull the same way?",
    "Do the sample weights follow the gradients?",
    "What did learning the rounding gain?",
    "How close is the predicted noise?",
    "Which layers cost the most?",
    "How far do the grids reach?",
    "How is it made again?",
]


def judged(file: EngineFile, out: Path, sha256: str | None = None) -> Path:
    """Write an evaluation of two engines, one of them this one."""
    context = {
        "images": 8,
        "images_sha256": "1" * 64,
        "seeds": [0, 7],
        "sampler": record_of(file).provenance.sampler.to_json(),
    }
    sets = {"features": "eyes", "features_sha256": "2" * 64, "reference": "real", "reference_sha256": "3" * 64}
    sets |= {"reference_images": 16, "floor_images": 8}

    def row(engine: str, value: float) -> list[Score]:
        own = context | {"engine_sha256": engine}
        distance = Score(metric="fd", name="distance", value=value, low=1.0, high=3.0, floor=0.5, context=own | sets)
        pair = Score(metric="psnr", name="PSNR", value=30.0, context=own | {"exact_sha256": "4" * 64})
        return [distance, pair]

    rows = {"ours": row(sha256 or file.sha256, 2.0), "another": row("5" * 64, 2.5)}
    return evaluate.write_evaluation(out, rows, {}).path.parent


@pytest.fixture(scope="module")
def page(tiny_run: Path, tiny_step_engine: EngineFile, tmp_path_factory) -> str:
    """The report of the tiny run, from the command line."""
    folder = tmp_path_factory.mktemp("report")
    words = ["report", str(tiny_run), "--engine", str(tiny_step_engine.path), "--images", "3", "--rounds", "2"]
    words += ["--evaluation", str(judged(tiny_step_engine, folder / "judged")), "--out", str(folder / "report.html")]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (0, f"{folder / 'report.html'}\n"), result.output
    assert sorted(p.name for p in folder.iterdir()) == ["judged", "report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_everything_and_needs_nothing_else(page: str) -> None:
    seen = outline(page)
    assert seen.titles == TITLES
    assert seen.seen["svg"] == 7
    assert seen.seen["img"] == 3
    assert seen.seen["script"] == seen.seen["link"] == seen.seen["iframe"] == 0
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = " ".join(seen.text.split())
    assert "seed 2: " in text
    assert "2 [1, 3], floor 0.5" in text
    assert "features eyes (222222222222); reference real, 16 images" in text
    assert "they took turns, 2 rounds after a warm-up" in text
    assert "openvino, float" in text


def test_the_numbers_are_those_of_the_engine(
    tiny_run: Path, tiny_step_engine: EngineFile, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    found = report.measure(
        tiny_run, tmp_path / "x.html", engine=tiny_step_engine.path, images=2, rounds=0, model=tiny_model
    )
    drawn = pipeline.sample(tiny_step_engine.path, num=2, out=tmp_path / "drawn", compare=True, model=tiny_model)
    assert torch.equal(found.drawn.quantized, drawn.images)
    assert drawn.psnr_db is not None
    decibels = report_page.psnr(found.drawn.quantized, found.drawn.exact).tolist()
    assert decibels == pytest.approx(drawn.psnr_db)
    assert found.speed is None
    assert found.judged is None
    ours, exact = found.sizes
    assert ours.weights == tiny_step_engine.audit.weight_bytes
    assert sum(exact.weights.values()) > sum(ours.weights.values()) > 0
    assert ours.files == tiny_step_engine.path.stat().st_size
    errors = found.inside.sensitivity
    assert list(errors) == list(load_plan(tiny_run / "plan.safetensors").layers)
    assert min(errors.values()) > 0


def test_it_refuses_an_engine_or_an_evaluation_of_something_else(
    tiny_run: Path, tiny_step_engine: EngineFile, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny_run, own)
    record = json.loads((own / "run.json").read_text())
    record["journal"] = [line for line in record["journal"] if line["step"] == "calibrate"]
    (own / "run.json").write_text(json.dumps(record))
    with pytest.raises(GaqError, match="tells of no engine: run `gaq-export build-engine --run"):
        report.measure(own, own / "report.html")
    other = judged(tiny_step_engine, tmp_path / "judged", sha256="6" * 64)
    with pytest.raises(GaqError, match=r"is not about .*unet\.plan: run `gaq-export evaluate --engine"):
        report.measure(own, own / "report.html", engine=tiny_step_engine.path, judged=other)
    with pytest.raises(GaqError, match="cannot be read as an evaluation"):
        report.measure(own, own / "report.html", engine=tiny_step_engine.path, judged=own)
    save_plan(dataclasses.replace(load_plan(own / "plan.safetensors"), blocks=()), own / "plan.safetensors")
    with pytest.raises(GaqError, match="was not built from the plan in"):
        report.measure(own, own / "report.html", engine=tiny_step_engine.path)


def test_the_engine_built_last_is_found_by_itself(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    own, plan = tmp_path / "run", tmp_path / "unet.plan"
    shutil.copytree(tiny_run, own)
    config = EngineConfig(backend="openvino", threads=1)
    built = pipeline.build_engine(folder=own, out=plan, config=config, graph="eps", model=tiny_model)
    found = report.engine_of(report.Run(folder=own), report.runs.read_record(report.Run(folder=own)), None)
    assert found.sha256 == built.file.sha256
    assert found.path == plan


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_browser_shows_all_of_it(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    seen = browser.look(page, tmp_path, width=width, dark=dark)
    assert seen["complaints"] == []
    assert (seen["images"], seen["figures"]) == (3, 7)
    assert seen["width"] <= width
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[what]))) for what in ("paper", "ink"))
    assert (paper < ink) == dark


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_complains_of_a_page_that_is_not_whole(tmp_path: Path) -> None:
    broken = '<meta charset="utf-8"><p>words</p><img src="data:image/png;base64,AAAA"><script>absent()</script>'
    seen = browser.look(broken, tmp_path, width=400)
    assert seen["images"] == 0
    assert len(seen["complaints"]) == 1
    assert "absent is not defined" in seen["complaints"][0]
