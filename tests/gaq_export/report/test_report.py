"""What a report measures of an engine, and which engines and evaluations it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from calib.errors import CalibError
from calib.plan import load_plan, save_plan
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.deploy.record import record_of
from gaq_export.errors import GaqError
from gaq_export.evaluation import evaluate
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel
from gaq_export.report import report, report_page
from gaq_export.report.inspection import InspectionOptions
from gaq_export.report.report import ReportOptions


def write_scores(file: EngineFile, out: Path, sha256: str | None = None) -> Path:
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


def test_the_numbers_are_those_of_the_engine(
    tiny_run: Path, tiny_step_engine: EngineFile, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    options = ReportOptions(engine=tiny_step_engine.path, inspection=InspectionOptions(images=2), rounds=0)
    measured = report.measure(tiny_run, tmp_path / "x.html", options, model=tiny_model)
    drawn = pipeline.sample(tiny_step_engine.path, num=2, out=tmp_path / "drawn", compare=True, model=tiny_model)
    assert torch.equal(measured.images.quantized, drawn.images)
    assert drawn.psnr_db is not None
    decibels = report_page.psnr(measured.images.quantized, measured.images.exact).tolist()
    assert decibels == pytest.approx(drawn.psnr_db)
    assert measured.speed is None
    assert measured.evaluation is None
    ours, exact = measured.sizes
    assert ours.weights == tiny_step_engine.audit.weight_bytes
    assert sum(exact.weights.values()) > sum(ours.weights.values()) > 0
    assert ours.files == tiny_step_engine.path.stat().st_size
    errors = measured.inspection.sensitivity
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
    with pytest.raises(GaqError, match="records no engine: run `gaq-export build-engine --run"):
        report.measure(own, own / "report.html", ReportOptions())
    other = write_scores(tiny_step_engine, tmp_path / "scores", sha256="6" * 64)
    with pytest.raises(GaqError, match=r"is not about .*unet\.plan: run `gaq-export evaluate --engine"):
        report.measure(own, own / "report.html", ReportOptions(engine=tiny_step_engine.path, evaluation=other))
    with pytest.raises(CalibError, match=r"Cannot read .*evaluation\.json"):
        report.measure(own, own / "report.html", ReportOptions(engine=tiny_step_engine.path, evaluation=own))
    save_plan(dataclasses.replace(load_plan(own / "plan.safetensors"), blocks=()), own / "plan.safetensors")
    with pytest.raises(GaqError, match="was not built from the plan in"):
        report.measure(own, own / "report.html", ReportOptions(engine=tiny_step_engine.path))


def test_the_engine_built_last_is_found_by_itself(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    own, plan = tmp_path / "run", tmp_path / "unet.plan"
    shutil.copytree(tiny_run, own)
    config = EngineConfig(backend="openvino", threads=1)
    built = pipeline.build_engine(folder=own, out=plan, config=config, graph="eps", model=tiny_model)
    measured = report.engine_of(report.Run(folder=own), report.runs.read_record(report.Run(folder=own)), None)
    assert measured.sha256 == built.file.sha256
    assert measured.path == plan
