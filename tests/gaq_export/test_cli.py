"""The command line: what a user types, the one line they get when it is wrong, and a run that survives being killed."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engines
from calib.plan import load_plan
from engines.nvinfer import no_gpu
from gaq_export.cli.progress import Display
from tests.gaq_export.commands import gaq, refused

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def own_home(home: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(home, tmp_path / "tiny")


@pytest.fixture
def own_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def own_engine(tiny_engine, tmp_path: Path) -> Path:
    """A copy of the engine that a test may spoil."""
    for name in ("unet.plan", "unet.plan.json"):
        shutil.copy(tiny_engine.path.with_name(name), tmp_path / name)
    return tmp_path / "unet.plan"


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A regular file, below which nothing can be written, whoever asks."""
    path = tmp_path / "file"
    path.write_text("in the way")
    return path


def test_the_three_commands_make_pictures(home: Path, tmp_path: Path) -> None:
    run, plan, out = tmp_path / "run", tmp_path / "unet.plan", tmp_path / "samples"
    few = ("--steps", 3, "--sampler", "ddpm")
    made = gaq("calibrate", "--weights", home, "--run", run, "--images", 2, "--iterations", 1)
    assert made.exit_code == 0, made.output
    assert "W4A8: 39 layers quantized" in made.stdout
    assert f"next: gaq-export build-engine --run {run}" in made.stdout
    record = json.loads((run / "run.json").read_text())["settings"]
    assert (record["images"], record["config"]["reconstruction"]["iterations"]) == (2, 1)
    built = gaq("build-engine", "--run", run, "--backend", "openvino", "--out", plan, "--batch", "1,2,2", *few)
    assert built.exit_code == 0, built.output
    assert "openvino audit" in built.stdout
    assert "against fake-quantized PyTorch: median SQNR" in built.stdout
    assert "1 x first layer" in " ".join(built.stdout.split())
    assert "10 layers depend on the step alone and are tables" in " ".join(built.stdout.split())
    assert f"openvino engine -> {plan}" in " ".join(built.stdout.split())
    drawn = gaq("sample", "--engine", plan, "-n", 2, "--compare", "--out", out)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout.startswith("2 images in ")
    assert "PSNR against float from the same noise: median " in drawn.stdout
    assert json.loads((out / "samples.json").read_text())["sampler"]["name"] == "ddpm"
    assert (out / "grid.png").is_file()


def test_an_engine_with_a_scale_for_each_step_and_quantized_attention_passes_its_check(
    home: Path, tmp_path: Path
) -> None:
    run, plan, words = tmp_path / "run", tmp_path / "unet.plan", ("--per-step-ranges", "--convention", "tfmq")
    few = ("--batch", "1,2,2")
    made = gaq("calibrate", "--weights", home, "--run", run, "--images", 2, "--iterations", 0, *words)
    assert made.exit_code == 0, made.output
    quantized = load_plan(run / "plan.safetensors")
    assert quantized.timesteps.tolist() == list(range(0, 100, 2))
    assert len(quantized.products) == 4
    for graph in ("step", "eps"):
        built = gaq("build-engine", "--run", run, "--backend", "openvino", "--graph", graph, "--out", plan, *few)
        assert built.exit_code == 0, built.output


def test_quiet_prints_only_the_result(tiny_run: Path, home: Path, tiny_engine, tmp_path: Path) -> None:
    again = gaq("calibrate", "--weights", home, "--run", tiny_run, "-q")
    assert again.output == f"W4A8: 39 layers quantized, 12 stay float -> {tiny_run}/plan.safetensors\n"
    drawn = gaq("sample", "--engine", tiny_engine.path, "-n", 1, "--steps", 1, "--out", tmp_path, "-q")
    assert len(drawn.output.splitlines()) == 1


def test_random_weights_are_said_to_be_meaningless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "collect", stop)
    result = gaq("calibrate", "--model", "ddpm-mnist", "--weights", "random", "--run", tmp_path / "run")
    assert "note: random weights, so the pictures are meaningless" in result.stderr


def test_the_models_are_listed() -> None:
    assert "ddpm-mnist" in gaq("models").stdout


def test_export_names_the_file_it_wrote(tiny_run: Path, tmp_path: Path) -> None:
    result = gaq("export", "--run", tiny_run, "--profile", "reference", "--out", tmp_path / "unet.onnx")
    assert result.stdout.replace("\n", "") == str(tmp_path / "unet.onnx")
    assert "No plan.safetensors in" in refused(tmp_path, "export", "--run", tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "ddpm-mnits"), r"Unknown model 'ddpm-mnits'. Did you mean 'ddpm-mnist'?"),
        ((), "Give the name of a model (see `gaq-export models`), or --weights FOLDER."),
        (("--model", "ddpm-mnist", "--wbits", 1), "weight bits = 1: choose a whole number from 2 to 8."),
        (("--model", "ddpm-mnist", "--wbits", 9), "weight bits = 9: choose a whole number from 2 to 8."),
        (("--model", "ddpm-mnist", "--abits", 16), "activation bits = 16: choose a whole number from 2 to 8."),
        (
            ("--model", "ddpm-mnist", "--preset", "slow"),
            "Unknown preset 'slow'. Choose one of ['tiny', 'fast', 'paper'",
        ),
        (("--model", "ddpm-mnist", "--omega", "max"), "Unknown omega rule 'max'. Choose one of ['fish', 'gac', "),
        (("--weights", "no-such-folder"), "no-such-folder"),
    ],
)
def test_a_wrong_calibration_setting_is_one_line(words: tuple[object, ...], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, "calibrate", *words, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--convention", "none"), "Unknown convention 'none'. Choose one of ['deploy', 'tfmq']."),
        (("--keep-float", "nothing*"), "--keep-float 'nothing*' matches no layer; names look like 'unet."),
        (("--images", 1), "Found 1 calibration images; at least 2 are needed"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_one_line(
    words: tuple[object, ...], message: str, home: Path, tmp_path: Path
) -> None:
    result = gaq("calibrate", "--weights", home, "--run", tmp_path / "run", *words, "-q")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "plan.safetensors").exists()


def spoil(folder: Path, how: str) -> None:
    file = folder / WEIGHTS
    if how == "pickle":
        torch.save(load_file(file), folder / "diffusion_pytorch_model.bin")
        file.unlink()
    elif how == "nan":
        state = load_file(file)
        state["conv_in.weight"][0, 0, 0, 0] = float("nan")
        save_file(state, file)
    else:
        file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("how", "message"), [("pickle", "are a pickle"), ("nan", "holds NaN"), ("truncated", "are damaged")]
)
def test_spoilt_weights_are_one_line(how: str, message: str, own_home: Path, tmp_path: Path) -> None:
    spoil(own_home, how)
    assert message in refused(tmp_path, "calibrate", "--weights", own_home, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_other_settings_is_one_line(own_run: Path, home: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, "calibrate", "--weights", home, "--run", own_run, "--wbits", 8)
    assert "holds a run with other settings" in line


def test_a_run_folder_that_cannot_be_written_is_one_line(in_the_way: Path, home: Path, tmp_path: Path) -> None:
    assert "Cannot write" in refused(tmp_path, "calibrate", "--weights", home, "--run", in_the_way / "run")


@pytest.mark.parametrize("file", ["plan.safetensors", "plan.json"])
def test_a_tampered_plan_is_one_line(file: str, own_run: Path, tmp_path: Path) -> None:
    content = bytearray((own_run / file).read_bytes())
    content[-10] ^= 1
    (own_run / file).write_bytes(content)
    line = refused(tmp_path, "build-engine", "--run", own_run, "--backend", "openvino", "--out", tmp_path / "u.plan")
    assert "run calibrate again" in line


def test_a_plan_of_other_weights_is_one_line(own_home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = gaq("calibrate", "--weights", own_home, "--run", run, "--images", 2, "--iterations", 1, "-q")
    assert made.exit_code == 0, made.output
    state = load_file(own_home / WEIGHTS)
    state["conv_in.bias"] += 1
    save_file(state, own_home / WEIGHTS)
    line = refused(tmp_path, "build-engine", "--run", run, "--backend", "openvino", "--out", tmp_path / "unet.plan")
    assert "This plan belongs to another model: it was made from tiny with weights" in line
    line = refused(tmp_path, "calibrate", "--weights", own_home, "--run", run, "--images", 2, "--iterations", 1)
    assert "holds a run with other settings (model:" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "openvno"), "Unknown backend 'openvno'. Choose one of ['tensorrt', 'tensorrt-rtx', 'openvino'"),
        (("--backend", "openvino", "--batch", "4"), "--batch '4': give three numbers, such as 1,4,16."),
        (("--backend", "openvino", "--batch", "4,2,1"), "Batch profile (4, 2, 1) is not in order"),
        (("--backend", "openvino", "--threads", 0), "Found threads=0; give 1 or more"),
    ],
)
def test_a_wrong_build_setting_is_one_line(
    words: tuple[object, ...], message: str, own_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "unet.plan").write_text("an earlier engine")
    line = refused(tmp_path, "build-engine", "--run", own_run, "--out", tmp_path / "unet.plan", *words)
    assert message in line


def test_a_target_for_another_backend_is_one_line(own_run: Path, tmp_path: Path) -> None:
    (tmp_path / "unet.plan").write_text("an earlier engine")
    words = ("--backend", "openvino", "--target", "sm89", "--out", tmp_path / "unet.plan")
    (own_run / "unet.openvino.onnx").unlink(missing_ok=True)
    result = gaq("build-engine", "--run", own_run, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: Found targets ['sm89'] for openvino; only tensorrt-rtx takes targets.\n"
    assert (tmp_path / "unet.plan").read_text() == "an earlier engine"


def test_an_engine_that_cannot_be_written_is_one_line(own_run: Path, in_the_way: Path, tmp_path: Path) -> None:
    out = in_the_way / "unet.plan"
    assert "Cannot write" in refused(tmp_path, "build-engine", "--run", own_run, "--backend", "openvino", "--out", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num", 0), "Found 0 images to draw"),
        (("--num", 99, "--batch", 99), "Batch 99 lies outside this engine's profile 1 to 16"),
        (("--batch", 0), "0"),
        (("--sampler", "euler"), "euler"),
        (("--steps", 0), "0"),
        (("--steps", 101), "101"),
        (("--spacing", "cubic"), "cubic"),
        (("--eta", "2"), "2"),
    ],
)
def test_a_wrong_sampling_setting_is_one_line(
    words: tuple[object, ...], message: str, own_engine: Path, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, "sample", "--engine", own_engine, "--out", tmp_path / "samples", *words)


def test_pictures_that_cannot_be_written_are_one_line(own_engine: Path, in_the_way: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, "sample", "--engine", own_engine, "-n", 1, "--steps", 1, "--out", in_the_way / "samples")
    assert "Cannot write" in line


def test_a_tampered_or_missing_engine_is_one_line(own_engine: Path, tmp_path: Path) -> None:
    content = bytearray(own_engine.read_bytes())
    content[len(content) // 2] ^= 1
    own_engine.write_bytes(content)
    out = tmp_path / "samples"
    assert "truncated, edited or half-written" in refused(tmp_path, "sample", "--engine", own_engine, "--out", out)
    assert "Cannot read the engine record" in refused(
        tmp_path, "sample", "--engine", tmp_path / "no.plan", "--out", out
    )
    (tmp_path / "unet.plan.json").write_text("{}")
    assert "has format None" in refused(tmp_path, "sample", "--engine", own_engine, "--out", out)


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_an_engine_for_a_gpu_that_is_not_here_is_built_and_refused_on_one_line(own_run: Path, tmp_path: Path) -> None:
    plan = tmp_path / "unet.plan"
    built = gaq("build-engine", "--run", own_run, "--backend", "tensorrt-rtx", "--out", plan)
    assert built.exit_code == 0, built.output
    assert "int4 " in built.stdout
    if no_gpu() is None:
        pytest.skip("this machine has an NVIDIA GPU")
    assert "not run here: no NVIDIA" in built.stdout
    line = refused(tmp_path, "sample", "--engine", plan, "--out", tmp_path / "samples")
    assert "was built for tensorrt-rtx, which cannot run here: no NVIDIA" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--block", "unet.mid_block.resnet.1"),
            "No block is called 'unet.mid_block.resnet.1'; 14 can be looked at. The",
        ),
        (("--block", "unet.mid_block.resnet.1"), "The nearest is 'unet.mid_block.resnets.1'."),
        (("--images", 0), "Found 0 images to measure with; ask for 1 or more."),
    ],
)
def test_a_wrong_wish_for_a_look_inside_is_one_line(words: tuple[object, ...], message: str, own_run: Path) -> None:
    assert message in refused(own_run, "inspect", own_run, *words)


def test_a_look_inside_needs_a_finished_run_and_a_place_to_write(own_run: Path, in_the_way: Path) -> None:
    assert "Cannot write to" in refused(own_run, "inspect", own_run, "--out", in_the_way / "page.html")
    (own_run / "run.json").unlink()
    assert "No record of a calibration in" in refused(own_run, "inspect", own_run)
    (own_run / "plan.safetensors").unlink()
    line = refused(own_run, "inspect", own_run)
    assert f"No plan.safetensors in {own_run}: run `gaq-export calibrate` first." in line


def test_an_interrupted_calibration_says_that_it_will_continue(
    home: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("calibrate", "--weights", home, "--run", tmp_path / "run", "-q")

    def stop(self: object, progress) -> None:
        if progress.result is not None and progress.index == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "calibrate", stop)
        result = gaq(*words)
    assert result.exit_code == 130
    assert result.stderr == "interrupted; the same command continues where it was\n"
    assert gaq(*words).exit_code == 0
    for name in ("plan.safetensors", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tiny_run / name).read_bytes()


@pytest.mark.slow
def test_a_killed_calibration_continues_to_the_same_bytes(home: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "gaq_export", "calibrate", "--weights", str(home), "--preset", "tiny", "--quiet"]
    process = subprocess.Popen(
        [*command, "--run", str(run)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / "blocks" / "000.safetensors").exists():
        assert process.poll() is None, "it ended before its first block"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(5).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "plan.safetensors").exists()
    finished = gaq("calibrate", "--weights", home, "--run", run, "-q")
    assert finished.exit_code == 0, finished.output
    for name in ("plan.safetensors", "plan.json"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes()


def test_doctor_says_what_every_backend_can_do_here() -> None:
    found = json.loads(gaq("doctor", "--json").stdout)
    assert set(found["backends"]) == set(engines.BACKENDS)
    assert found["backends"]["openvino"] == {"cannot_build": None, "cannot_run": None}
    for name, problems in found["backends"].items():
        assert problems["cannot_run"] == engines.BACKENDS[name].can_run()
    assert found["best"] == engines.best_backend()
    shown = " ".join(gaq("doctor").stdout.split())
    assert f"build-engine takes: {found['best']}" in shown
    assert found["machine"]["processor"] in shown
