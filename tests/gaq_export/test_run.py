"""The run folder: its record and the refusal to mix two runs."""

import json
import sys
from pathlib import Path

import pytest

import gaq_export
from calib.errors import CalibError
from gaq_export.errors import GaqError
from gaq_export.run import (
    Run,
    add_entry,
    claim,
    command_and_versions,
    peak_memory_mib,
    read_record,
)

SETTINGS = {"images": 4, "model": {"name": "tiny"}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder that has been claimed."""
    made = Run(folder=tmp_path / "run")
    claim(made, SETTINGS)
    return made


def test_every_file_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    files = [run.record, run.plan, run.calibration, run.blocks, run.times, run.inspection, run.report]
    files.append(run.onnx("trt", "step"))
    assert {file.parent for file in files} == {tmp_path}
    assert len(set(files)) == len(files)


def test_the_same_settings_continue_a_run_and_others_are_refused(run: Run) -> None:
    before = run.record.read_bytes()
    claim(run, SETTINGS)
    assert run.record.read_bytes() == before
    with pytest.raises(GaqError, match=r"holds a run with other settings \(images: 4, now 5\)\. Give --run another"):
        claim(run, {**SETTINGS, "images": 5})
    with pytest.raises(GaqError, match=r"\(sampler: null, now \"ddim\"\)"):
        claim(run, {**SETTINGS, "sampler": "ddim"})
    with pytest.raises(GaqError, match=r"\(model: .*tiny.*, now \"a{56}\.\.\.\)"):
        claim(run, {**SETTINGS, "model": "a" * 100})


def test_the_journal_keeps_every_entry_and_finds_the_newest_of_a_step(run: Run) -> None:
    add_entry(run, "calibrate", seconds=1.0)
    add_entry(run, "build-engine", engine="a.plan")
    add_entry(run, "build-engine", engine="b.plan")
    record = read_record(run)
    assert record.settings == SETTINGS
    assert [entry["step"] for entry in record.journal] == ["calibrate", "build-engine", "build-engine"]
    assert record.last("build-engine")["engine"] == "b.plan"
    assert record.last("calibrate")["version"] == gaq_export.__version__
    assert record.last("pack") == {}


ENTRY = {"step": "build-engine", "engine": "a.plan"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"run\.json: .*Give --run another folder"),
        ("[" * 100_000, r"run\.json: .*recursion.*Give --run another folder"),
        ("[]", r"the record is \[\], expected an object"),
        ({"format": 0}, "is not a run record of format 1"),
        ({"format": 1}, "settings is missing"),
        ({"format": 1, "settings": {}, "journal": []}, "No record of a calibration in .*: run"),
        ({"format": 1, "settings": [], "journal": []}, "settings is "),
        ({"format": 1, "settings": SETTINGS, "journal": {}}, "journal is "),
        ({"format": 1, "settings": SETTINGS, "journal": [3]}, "journal.0 is 3"),
        ({"format": 1, "settings": SETTINGS, "journal": [{}]}, "journal.0: step is missing"),
        ({"format": 1, "settings": SETTINGS, "journal": [ENTRY | {"engine": 3}]}, "journal.0: engine is 3"),
        ({"format": 1, "settings": SETTINGS, "journal": [ENTRY | {"engine": "a\0"}]}, "journal.0: engine is"),
        ({"format": 1, "settings": SETTINGS, "journal": [ENTRY | {"packages": 1}]}, "journal.0: packages is 1"),
        ({"format": 1, "settings": SETTINGS | {"images": -1}, "journal": []}, "settings: images is -1"),
        ({"format": 1, "settings": SETTINGS | {"images": 10**12}, "journal": []}, "settings: images is"),
        ({"format": 1, "settings": SETTINGS | {"model": []}, "journal": []}, "settings: model is"),
    ],
)
def test_a_record_of_another_form_is_one_line(run: Run, content: object, message: str) -> None:
    run.record.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((CalibError, GaqError), match=message) as error:
        read_record(run)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="No record of a calibration"):
        read_record(Run(folder=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/usr/bin/gaq-export", "sample", "--out", "a b"], "gaq-export sample --out 'a b'"),
        (["/site/gaq_export/__main__.py", "doctor"], "gaq-export doctor"),
        (["/usr/bin/pytest", "-q"], None),
    ],
)
def test_only_our_own_command_line_is_recorded(
    arguments: list[str], command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    facts = command_and_versions()
    assert facts["command"] == command
    assert facts["packages"]["torch"]
    json.dumps(facts)


def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_memory_mib()
    assert peak is None or 50 < peak < 1 << 20


@pytest.mark.parametrize(
    ("began", "now", "advice"),
    [
        (None, "cuda", "began on cpu, now cuda: give --device cpu, or another --run."),
        ("cuda", None, "began on cuda, now cpu: give --device cuda, or another --run."),
        ("cuda", "cuda with TF32", "began on cuda, now cuda with TF32: give --device cuda without --tf32, or another"),
        ("cuda with TF32", None, "began on cuda with TF32, now cpu: give --device cuda --tf32, or another --run."),
    ],
)
def test_a_run_continues_on_the_kind_of_device_it_began_on(
    began: str | None, now: str | None, advice: str, tmp_path: Path
) -> None:
    there = Run(folder=tmp_path / "there")
    first, second = ({**SETTINGS, **({"device": kind} if kind else {})} for kind in (began, now))
    claim(there, first)
    with pytest.raises(GaqError, match=advice):
        claim(there, second)
