"""The stages of the GPU check, on the CPU and a tiny model: their code runs to the last line."""

from dataclasses import replace
from pathlib import Path

import pytest

import engines
import gpu_calibration
import gpu_engines
import gpu_pictures
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel
from gpu_records import GPU_BACKENDS, PYTORCH, Finding, NotRun, Request

SPEC = SamplerSpec(steps=3)


@pytest.fixture
def found() -> list[Finding]:
    """Findings; its `append` is what a stage reports to."""
    return []


@pytest.fixture
def request_of(home: Path, tmp_path: Path) -> Request:
    """A stage's request for the tiny model on the CPU."""
    sizes = {"steps": 3, "calibration_steps": 3, "images": 3, "batch": 2}
    return Request(model="tiny", weights=str(home), folder=str(tmp_path), device="cpu", preset="tiny", **sizes)


def test_a_calibration_is_timed_judged_and_compared_and_pictures_are_drawn_with_its_plan(
    request_of: Request, found: list[Finding], tiny_run: Path
) -> None:
    request = replace(request_of, cpu_plan=str(tiny_run / "plan.safetensors"))
    gpu_calibration.calibrate_large(request, found.append)
    theirs, ours, judged, beside = found
    assert {"collect, s", "fit, s"} <= theirs.facts.keys() & ours.facts.keys()
    assert judged.facts["SQNR of the noise, dB"] > 10
    assert beside.facts["equal codes, %"] == beside.facts["equal codes of the worst layer, %"] == 100
    found.clear()

    gpu_pictures.draw_all(request_of, found.append)
    last = {one.part: one for one in found}
    assert last["W4A8, its plan"].facts["made by"] == "the calibration above, tiny"
    assert last["images"].facts["drawn"] == 3
    assert last["W8A8, drawn"].facts["PSNR to float, median dB"] > last["W4A8, drawn"].facts["PSNR to float, median dB"]
    assert last["features"].failed == "no classifier was given: --classifier"


def test_a_device_that_is_not_there_is_a_reason_not_to_run(request_of: Request, found: list[Finding]) -> None:
    with pytest.raises(NotRun, match="cuda:7"):
        gpu_calibration.calibrate_large(replace(request_of, device="cuda:7"), found.append)
    with pytest.raises(NotRun, match="tensorrt"):
        gpu_engines.report_engine("tensorrt/no-such-type", request_of, found.append)
    assert found == []


def test_every_type_of_every_gpu_backend_is_tried() -> None:
    known = {name: backend.computes for name, backend in engines.BACKENDS.items() if backend.on_gpu}
    assert known == GPU_BACKENDS


def test_an_engine_is_built_checked_and_timed(tiny_run: Path, tiny_model: LoadedModel) -> None:
    config = engines.EngineConfig(backend="openvino", batch=(1, 2, 2), threads=1)
    measured = gpu_engines.examine(tiny_model, SPEC, tiny_run, config, timing=False)
    assert measured["parity_db"] >= measured["required_db"]
    assert len(measured["loop_seconds"]) == 5
    assert measured["batch_difference"] < 0.05
    findings = [
        Finding(part=PYTORCH, facts={"device": "cpu", "loop_seconds": [10.0]}),
        Finding(part="openvino/float32", facts={**measured, "against_float": "as fast as float here"}),
        Finding(part="tensorrt/float32", facts={}, failed="it was too warm"),
    ]
    lines = list(gpu_engines.page(findings, 2))
    assert [line for line in lines if line.startswith("| openvino, float32 |")]
    assert [line for line in lines if line.startswith("\nopenvino, float32: ") and "as float" in line]
    assert lines[-1] == "\ntensorrt, float32: **failed**, it was too warm"
