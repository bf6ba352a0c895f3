"""`build-engine` and `export`: what they check of the plan, of their options and of the engine."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from calib.plan import load_plan
from engines.nvinfer import no_gpu
from gaq_export.cli import progress
from tests.gaq_export.commands import gaq, refused

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_an_engine_with_a_scale_for_each_step_and_quantized_attention_passes_its_check(
    home: Path, tmp_path: Path
) -> None:
    run, plan, words = tmp_path / "run", tmp_path / "unet.plan", ("--per-step-ranges", "--convention", "tfmq")
    few = ("--batch", "1,2,2")
    result = gaq("calibrate", "--weights", home, "--run", run, "--images", 2, "--iterations", 0, *words)
    assert result.exit_code == 0, result.output
    quantized = load_plan(run / "plan.safetensors")
    assert quantized.timesteps.tolist() == list(range(0, 100, 2))
    assert len(quantized.products) == 4
    for graph in ("step", "eps"):
        built = gaq("build-engine", "--run", run, "--backend", "openvino", "--graph", graph, "--out", plan, *few)
        assert built.exit_code == 0, built.output
        assert "by openvino, float32: " in " ".join(built.stdout.split())
        entry = json.loads((run / "run.json").read_text())["journal"][-1]
        assert list(entry["call_seconds"]) == ["openvino, float32", "openvino, W4A8"]
        assert min(entry["call_seconds"].values()) > 0
        assert [path.name for path in tmp_path.glob(".*")] == []


def test_export_names_the_file_it_wrote(tiny_run: Path, tmp_path: Path) -> None:
    result = gaq("export", "--run", tiny_run, "--profile", "reference", "--out", tmp_path / "unet.onnx")
    assert result.stdout.replace("\n", "") == str(tmp_path / "unet.onnx")
    assert "No plan.safetensors in" in refused(tmp_path, "export", "--run", tmp_path / "none")


@pytest.mark.parametrize("file", ["plan.safetensors", "plan.json"])
def test_a_tampered_plan_is_one_line(file: str, run_copy: Path, tmp_path: Path) -> None:
    content = bytearray((run_copy / file).read_bytes())
    content[-10] ^= 1
    (run_copy / file).write_bytes(content)
    line = refused(tmp_path, "build-engine", "--run", run_copy, "--backend", "openvino", "--out", tmp_path / "u.plan")
    assert "run calibrate again" in line


def test_a_plan_of_other_weights_is_one_line(home_copy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = gaq("calibrate", "--weights", home_copy, "--run", run, "--images", 2, "--iterations", 1, "-q")
    assert result.exit_code == 0, result.output
    state = load_file(home_copy / WEIGHTS)
    state["conv_in.bias"] += 1
    save_file(state, home_copy / WEIGHTS)
    line = refused(tmp_path, "build-engine", "--run", run, "--backend", "openvino", "--out", tmp_path / "unet.plan")
    assert "This plan belongs to another model: it was made from tiny with weights" in line
    line = refused(tmp_path, "calibrate", "--weights", home_copy, "--run", run, "--images", 2, "--iterations", 1)
    assert "holds a run with other settings (model:" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "openvno"), "Unknown backend 'openvno'. Choose one of ['tensorrt', 'tensorrt-rtx', 'openvino'"),
        (("--backend", "openvino", "--batch", "4"), "--batch '4': give three numbers, such as 1,4,16."),
        (("--backend", "openvino", "--device", "cuda:99"), "Found --device cuda:99, but "),
        (("--backend", "openvino", "--device", "gpu"), "Found the device 'gpu'; give auto, cpu, cuda, cuda:N"),
        (("--backend", "openvino", "--batch", "4,2,1"), "Batch profile (4, 2, 1) is not in order"),
        (
            ("--backend", "openvino", "--batch", "1,4,9999999999999"),
            "Found a batch of 9999999999999; give 65536 at most",
        ),
    ],
)
def test_a_wrong_build_setting_is_one_line(
    words: tuple[object, ...], message: str, run_copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "unet.plan").write_text("an earlier engine")
    line = refused(tmp_path, "build-engine", "--run", run_copy, "--out", tmp_path / "unet.plan", *words)
    assert message in line


def test_a_target_for_another_backend_is_one_line(run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "unet.plan").write_text("an earlier engine")
    words = ("--backend", "openvino", "--target", "sm89", "--out", tmp_path / "unet.plan")
    (run_copy / "unet.openvino.onnx").unlink(missing_ok=True)
    result = gaq("build-engine", "--run", run_copy, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: Found targets ['sm89'] for openvino; only tensorrt-rtx takes targets.\n"
    assert (tmp_path / "unet.plan").read_text() == "an earlier engine"


def test_an_engine_that_cannot_be_written_is_one_line(run_copy: Path, in_the_way: Path, tmp_path: Path) -> None:
    out = in_the_way / "unet.plan"
    assert "Cannot write" in refused(tmp_path, "build-engine", "--run", run_copy, "--backend", "openvino", "--out", out)


ENGINE = ("build-engine", "--backend", "openvino")


@pytest.mark.parametrize("command", ["build-engine", "export", "inspect", "report"])
def test_no_output_overwrites_the_calibration(command: str, run_copy: Path, engine_copy: Path, tmp_path: Path) -> None:
    (run_copy / "link").symlink_to(run_copy)
    run = (run_copy,) if command in ("inspect", "report") else ("--run", run_copy)
    words = {"build-engine": ENGINE, "report": ("report", "--engine", engine_copy)}.get(command, (command,))
    for name in ("plan.safetensors", "plan.json", "run.json", "calibration/0000.safetensors", "link/plan.json"):
        line = refused(tmp_path, *words, *run, "--out", run_copy / name)
        assert "which is still needed: choose another name." in line


@pytest.mark.parametrize("name", ["plan", "run"])
def test_no_record_of_an_engine_overwrites_the_calibration(name: str, run_copy: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *ENGINE, "--run", run_copy, "--out", run_copy / name)
    assert f"{name}.json would overwrite" in line


@pytest.mark.parametrize("words", [ENGINE, ("export",)])
def test_an_output_that_is_a_folder_or_a_model_s_weights_is_refused_before_the_build(
    words: tuple[str, ...], home_copy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = gaq("calibrate", "--weights", home_copy, "--run", run, "--images", 2, "--iterations", 0, "-q")
    assert result.exit_code == 0, result.output
    assert "is a folder; give the name of a file" in refused(tmp_path, *words, "--run", run, "--out", tmp_path)
    line = refused(tmp_path, *words, "--run", run, "--out", home_copy / WEIGHTS)
    assert f"{WEIGHTS}, which is still needed" in line


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_an_engine_for_a_gpu_that_is_not_here_is_built_and_refused_on_one_line(run_copy: Path, tmp_path: Path) -> None:
    plan = tmp_path / "unet.plan"
    built = gaq("build-engine", "--run", run_copy, "--backend", "tensorrt-rtx", "--out", plan)
    assert built.exit_code == 0, built.output
    assert "int4 " in built.stdout
    if no_gpu() is None:
        pytest.skip("this machine has an NVIDIA GPU")
    assert "not run here: no NVIDIA" in built.stdout
    line = refused(tmp_path, "sample", "--engine", plan, "--out", tmp_path / "samples")
    assert "was built for tensorrt-rtx, which cannot run here: no NVIDIA" in line


def test_a_log_names_the_stages_of_a_build(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    words = ("build-engine", "--run", run_copy, "--backend", "openvino", "--graph", "eps", "--out", tmp_path / "u.plan")
    built = gaq(*words)
    assert built.exit_code == 0, built.output
    stages = ("loading the model", "exporting the graph", "building with openvino", "checking against PyTorch")
    lines = [line for line in built.stderr.splitlines() if line.startswith(stages)]
    assert list(dict.fromkeys(line.partition(",")[0] for line in lines)) == list(stages)
