"""`sample`: pictures from three commands, and the one line that a user gets when something is wrong."""

import json
from pathlib import Path

import pytest

from tests.gaq_export.commands import gaq, refused
from tests.records import edit_engine_record


def test_the_three_commands_make_pictures(home: Path, tmp_path: Path) -> None:
    run, plan, out = tmp_path / "run", tmp_path / "unet.plan", tmp_path / "samples"
    few = ("--steps", 3, "--sampler", "ddpm")
    result = gaq("calibrate", "--weights", home, "--run", run, "--images", 2, "--iterations", 1)
    assert result.exit_code == 0, result.output
    assert "W4A8: 39 layers quantized" in result.stdout
    assert f"next: gaq-export build-engine --run {run}" in result.stdout
    record = json.loads((run / "run.json").read_text())["settings"]
    assert (record["images"], record["config"]["reconstruction"]["iterations"]) == (2, 1)
    built = gaq("build-engine", "--run", run, "--backend", "openvino", "--out", plan, "--batch", "1,2,2", *few)
    assert built.exit_code == 0, built.output
    assert "openvino audit" in built.stdout
    assert "against fake-quantized PyTorch: median SQNR" in built.stdout
    assert "against the float network, on 2 held-out trajectories: " in built.stdout
    assert "1 x first layer" in " ".join(built.stdout.split())
    assert "10 layers depend on the step alone and are tables" in " ".join(built.stdout.split())
    assert f"openvino engine -> {plan}" in " ".join(built.stdout.split())
    drawn = gaq("sample", "--engine", plan, "-n", 2, "--compare", "--out", out)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout.startswith("2 images in ")
    assert "PSNR against float from the same noise: median " in drawn.stdout
    assert json.loads((out / "samples.json").read_text())["sampler"]["name"] == "ddpm"
    assert (out / "grid.png").is_file()


def test_quiet_prints_only_the_result(tiny_run: Path, home: Path, tiny_engine, tmp_path: Path) -> None:
    again = gaq("calibrate", "--weights", home, "--run", tiny_run, "-q")
    assert again.stdout == f"W4A8: 39 layers quantized, 12 stay float -> {tiny_run}/plan.safetensors\n"
    drawn = gaq("sample", "--engine", tiny_engine.path, "-n", 1, "--steps", 1, "--out", tmp_path, "-q")
    assert len(drawn.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num", 99, "--batch", 99), "Batch 99 lies outside this engine's profile 1 to 16"),
        (("--sampler", "euler"), "euler"),
        (("--steps", 101), "101"),
        (("--spacing", "cubic"), "cubic"),
        (("--seed", 2**64), "Found the seed 18446744073709551616 for 16 images; give a whole number from 0 to 92233"),
        (("--seed", 2**63 - 1), "for 16 images; give a whole number from 0 to 9223372036854775792."),
        (("--num", 2_000_000, "--shard", 1), "2000000 images in files of 1 are more than 1000000 files: put more into"),
    ],
)
def test_a_wrong_sampling_setting_is_one_line(
    words: tuple[object, ...], message: str, engine_copy: Path, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, "sample", "--engine", engine_copy, "--out", tmp_path / "samples", *words)


def test_pictures_that_cannot_be_written_are_one_line(engine_copy: Path, in_the_way: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, "sample", "--engine", engine_copy, "-n", 1, "--steps", 1, "--out", in_the_way / "samples")
    assert "Cannot write" in line


def test_a_tampered_or_missing_engine_is_one_line(engine_copy: Path, tmp_path: Path) -> None:
    content = bytearray(engine_copy.read_bytes())
    content[len(content) // 2] ^= 1
    engine_copy.write_bytes(content)
    out = tmp_path / "samples"
    assert "truncated, edited or half-written" in refused(tmp_path, "sample", "--engine", engine_copy, "--out", out)
    assert "Cannot read the engine record" in refused(
        tmp_path, "sample", "--engine", tmp_path / "no.plan", "--out", out
    )
    (tmp_path / "unet.plan.json").write_text("{}")
    assert "has format None" in refused(tmp_path, "sample", "--engine", engine_copy, "--out", out)


@pytest.mark.filterwarnings("always::engines.EngineWarning")
@pytest.mark.parametrize("words", [(), ("--workers", 2)], ids=["here", "in processes"])
def test_an_engine_of_another_processor_draws_with_one_note(
    words: tuple[object, ...], engine_copy: Path, tmp_path: Path
) -> None:
    edit_engine_record(engine_copy, lambda record: record["processor"].append("amx_int4"))
    drawn = gaq("sample", "--engine", engine_copy, "-n", 2, "--steps", 1, "--out", tmp_path / "samples", *words)
    assert drawn.exit_code == 0, drawn.output
    notes = [line for line in drawn.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: the engine was built on another processor: this one lacks amx_int4. Pictures may differ in their last "
        "digits, and times; build the engine again here for the figures of this machine"
    ]
