"""`doctor`: what it says is what the backends say."""

import json

import pytest

import engines
from engines import driver, machine
from engines.driver import Gpu
from tests.gaq_export.commands import gaq


def test_doctor_says_what_every_backend_can_do_here() -> None:
    diagnosis = json.loads(gaq("doctor", "--json").stdout)
    assert set(diagnosis["backends"]) == set(engines.BACKENDS)
    assert diagnosis["backends"]["openvino"] == {"cannot_build": None, "cannot_run": None}
    for name, problems in diagnosis["backends"].items():
        assert problems["cannot_run"] == engines.BACKENDS[name].can_run()
    assert diagnosis["best"] == engines.best_backend()
    shown = " ".join(gaq("doctor").stdout.split())
    assert f"build-engine takes: {diagnosis['best']}" in shown
    assert diagnosis["machine"]["processor"] in shown


def with_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: str) -> None:
    gpu = Gpu(name=name, capability=capability, memory_bytes=80 << 30, cuda="13.0")
    for module in (machine, driver):
        monkeypatch.setattr(module, "gpus", lambda: (gpu,))


@pytest.mark.parametrize(
    ("capability", "runs", "fast"),
    [("8.9", True, True), ("9.0", False, True), ("10.0", False, False), ("10.3", False, False), ("12.0", True, True)],
)
def test_doctor_says_what_a_gpu_is_not_made_for(
    capability: str, runs: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, "NVIDIA X100", capability)
    monkeypatch.setenv("COLUMNS", "300")
    shown = gaq("doctor").stdout
    line = f"tensorrt-rtx does not run on the NVIDIA X100 (compute capability {capability}): use tensorrt"
    assert (line not in shown) == runs
    slow = "INT8 is not the fast path of the NVIDIA X100: FP8 is, with"
    assert (slow not in shown) == fast
    said = json.loads(gaq("doctor", "--json").stdout)
    assert (said["backends"]["tensorrt-rtx"]["cannot_run"] != line) == runs
    assert [(line in note, slow in note) for note in said["notes"]] == ([] if runs else [(True, not fast)])
