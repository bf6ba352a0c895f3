"""The GPU check runs every stage whatever the others do, says "not run" without a GPU, and compares layer by layer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.backend.onnxrt import OnnxrtRunner

import gpu_calibration
import gpu_check
from engines.driver import no_gpu
from gpu_check import Check, Status
from gpu_records import Finding, NotRun, Request
from gpu_stages import Stage, report_tests
from layerwise import compare_layers, onnxruntime_runner
from tests.engines.conftest import tiny_feeds, tiny_model


@pytest.mark.skipif(no_gpu() is None, reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_it_says_so_and_is_content(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    command = [sys.executable, script, "--out", "page.md"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("gpu-check: not run: no NVIDIA ")
    assert "Calibration: not run" in found.stdout
    assert "| Calibration | not run: no NVIDIA " in (tmp_path / "page.md").read_text()
    stages = json.loads((tmp_path / "page.json").read_bytes())["stages"]
    assert {stage["status"] for stage in stages.values()} == {"not run"}


STAGES = """
import sys, time
from pathlib import Path
from gpu_records import Finding, append_finding
name, findings = sys.argv[1], Path(sys.argv[3])
append_finding(findings, Finding(part="before", facts={"seconds": 1.5, "right": True, "loss": float("inf")}))
if name == "refuses":
    print("no such device")
    sys.exit(3)
if name == "crashes":
    raise ValueError("a | b")
if name == "hangs":
    time.sleep(60)
append_finding(findings, Finding(part="after", facts={}, failed="too warm" if name == "half" else None))
"""


def test_a_stage_that_fails_or_hangs_stops_no_other_and_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stages.py"
    script.write_text(STAGES)
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_check.__file__).parent))
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    names = ("refuses", "crashes", "half", "hangs", "works")
    stages = {name: Stage(title=name.title(), share=1.0, run=lambda *_: None) for name in names}
    stages["hangs"] = Stage(title="Hangs", share=0.1, run=lambda *_: None)
    out = tmp_path / "gpu-some.md"
    check = Check(machine="a machine", request=Request(folder=str(tmp_path)), notes=("a note",), out=out, stages=stages)
    results = gpu_check.run_all(check, 20)
    assert [one.status for one in results.values()] == [
        *(Status.NOT_RUN, Status.FAILED, Status.FAILED, Status.CUT_OFF, Status.DONE)
    ]
    assert results["refuses"].reason == "no such device"
    assert results["crashes"].reason == "the process ended with 1: ValueError: a | b"
    assert results["half"].reason == "1 of 2 parts failed"
    assert [len(one.findings) for one in results.values()] == [1, 1, 2, 1, 2]
    text = out.read_text()
    assert "| Crashes | failed: the process ended with 1: ValueError: a \\| b |" in text
    assert "| before | seconds | 1.5 |\n|  | right | yes |\n| after | **failed** | too warm |" in text
    assert "| Works | done in 0 s |" in text or "| Works | done in 1 s |" in text
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["stages"]["hangs"]["status"] == "cut off"


def test_without_time_left_a_stage_is_not_run(tmp_path: Path) -> None:
    stages = {"late": Stage(title="Late", share=1.0, run=lambda *_: None)}
    out = tmp_path / "late.md"
    check = Check(machine="a machine", request=Request(folder=str(tmp_path)), notes=(), out=out, stages=stages)
    assert gpu_check.run_all(check, 1)["late"].line == "not run: no time was left"


def test_tests_are_reported_with_what_they_recorded() -> None:
    found: list[Finding] = []
    skipped = '<testcase name="test_b"><skipped message="Skipped: no GPU"/></testcase>'
    passed = (
        '<testcase name="test_a_b[pycuda]"><properties><property name="largest" value="6e-07"/></properties></testcase>'
    )
    failed = '<testcase name="test_c"><failure message="assert 1 == 2"/></testcase>'
    report_tests(f"<suite>{passed}{skipped}{failed}</suite>", found.append)
    assert found[0] == Finding(part="a b[pycuda]", facts={"result": "passed", "largest": 6e-07})
    assert found[1].facts == {"result": "skipped: Skipped: no GPU"}
    assert found[2].failed == "assert 1 == 2"
    with pytest.raises(NotRun, match=r"^no GPU$"):
        report_tests(f"<suite>{skipped}{skipped}</suite>", found.append)


def test_layers_are_compared_one_by_one(tmp_path: Path) -> None:
    graph = tmp_path / "tiny.onnx"
    model = tiny_model("int8")
    onnx.save(model, graph)

    def optimised(file: bytes, feeds: object) -> OnnxrtRunner:
        return onnxruntime_runner(file, "ORT_ENABLE_EXTENDED")

    def broken(file: bytes, feeds: object) -> OnnxrtRunner:
        other = onnx.load_from_string(file)
        for tensor in other.graph.initializer:
            if tensor.name == "w_conv.codes":
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        return onnxruntime_runner(other.SerializeToString())

    same, differ = (compare_layers(graph, tiny_feeds(2), make) for make in (optimised, broken))
    assert min(same.values()) > 80
    assert next(name for name, db in differ.items() if db < 20) == "conv"
    assert differ.keys() == same.keys()
    assert np.isfinite(list(differ.values())).all()


def test_the_codes_of_every_layer_are_in_the_json_and_the_page_names_the_worst() -> None:
    facts = gpu_calibration.SameCodes(share=0.99, layers={"a": 1.0, "b": 0.5, "c": 0.75}).facts
    assert facts["the worst layer"] == "b"
    assert (facts["equal codes of the worst layer, %"], facts["equal codes of the median layer, %"]) == (50, 75)
    rows = list(gpu_check._rows(Finding(part="codes", facts=facts)))
    assert len(rows) == len(facts) - 1
    assert not any("by layer" in name for _, name, _ in rows)
