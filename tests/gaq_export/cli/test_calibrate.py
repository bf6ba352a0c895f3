"""`calibrate`: the one line that a user gets when something is wrong, and a run that survives being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaq_export.cli.progress import Display
from tests.gaq_export.commands import gaq, refused

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).resolve().parents[3]


def test_random_weights_are_said_to_be_meaningless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "collect", stop)
    result = gaq("calibrate", "--model", "ddpm-mnist", "--weights", "random", "--run", tmp_path / "run")
    assert "note: random weights, so the pictures are meaningless" in result.stderr


def _stopped(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """Start to calibrate, stop before the first trajectory, and return stderr."""

    def stop(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "collect", stop)
    printed: str = gaq("calibrate", "--preset", "tiny", *words).stderr
    return printed


SCHEDULERS = {
    "EulerDiscreteScheduler": "with use_karras_sigmas True, which is not among the samplers here; drawn with dpmpp-2m, "
    "50 steps, linspace spacing instead. --sampler, --spacing and --steps choose others.",
    "UniPCMultistepScheduler": "with use_karras_sigmas True, which is not among the samplers here; drawn with dpmpp-2m",
    "DDPMScheduler": "which draws well in hundreds of steps alone (--sampler ddpm --steps 100 is the same); drawn with",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_sampler_than_the_model_asks_for_is_one_line(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"_class_name": name, "num_train_timesteps": 100, "beta_end": 0.2, "use_karras_sigmas": True}
    (tiny_folder / "scheduler_config.json").write_text(json.dumps(config))
    words = ("--weights", tiny_folder, "--run", tmp_path / "run")
    printed = _stopped(monkeypatch, *words)
    assert printed.startswith(f"note: The scheduler config names {name}")
    assert SCHEDULERS[name] in printed
    assert printed.count(name) == 1
    assert ", 3 steps, " in _stopped(monkeypatch, *words[:2], "--run", tmp_path / "three", "--steps", 3)
    chosen = _stopped(monkeypatch, *words[:2], "--run", tmp_path / "named", "--sampler", "ddpm", "--steps", 3)
    assert name not in chosen


def test_a_model_that_does_not_predict_noise_is_refused_in_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    line = refused(tmp_path, "calibrate", "--weights", tiny_folder, "--run", tmp_path / "run")
    assert "FlowMatchEulerDiscreteScheduler is for flow matching, where the network predicts a velocity" in line


def test_a_model_of_forty_timesteps_takes_as_many_steps(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 40, "beta_end": 0.5, "steps_offset": 1}
    (tiny_folder / "scheduler_config.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    assert "error" not in _stopped(monkeypatch, "--weights", tiny_folder, "--run", run)
    sampler = json.loads((run / "run.json").read_text())["settings"]["sampler"]
    assert (sampler["steps"], sampler["spacing"]) == (39, "from-1")
    # A model of the table has its papers' steps, and the line says which option changes them.
    words = ("--model", "ddpm-mnist", "--weights", tiny_folder, "--run", tmp_path / "named")
    line = refused(tmp_path, "calibrate", *words)
    assert (
        "50 sampling steps are more than the 40 timesteps of the model allow ddim: choose --steps 40 or fewer" in line
    )
    assert "error" not in _stopped(monkeypatch, *words[:-1], tmp_path / "again", "--steps", 40)


def test_the_models_are_listed() -> None:
    assert "ddpm-mnist" in gaq("models").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "ddpm-mnits"), r"Unknown model 'ddpm-mnits'. Did you mean 'ddpm-mnist'?"),
        ((), "Give the name of a model (see `gaq-export models`), or --weights FOLDER."),
        (("--model", "ddpm-mnist", "--ray", "local"), "--ray spreads the candidates of --recipe auto over a cluster"),
        (("--model", "ddpm-mnist", "--abits", "9"), "activation bits = 9: choose a whole number from 2 to 8."),
        (("--model", "ddpm-mnist", "--abits", "8" * 5000), "Found activation bits '8888"),
        (("--model", "ddpm-mnist", "--seed", 2**64), "Found the seed 18446744073709551616; give a whole number from 0"),
        (("--model", "ddpm-mnist", "--budget", ".bits"), "Found a budget of '.bits'; write it as 5bits"),
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
def test_spoilt_weights_are_one_line(how: str, message: str, home_copy: Path, tmp_path: Path) -> None:
    spoil(home_copy, how)
    assert message in refused(tmp_path, "calibrate", "--weights", home_copy, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_other_settings_is_one_line(run_copy: Path, home: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, "calibrate", "--weights", home, "--run", run_copy, "--wbits", 8)
    assert "holds a run with other settings" in line


def test_a_run_folder_that_cannot_be_written_is_one_line(in_the_way: Path, home: Path, tmp_path: Path) -> None:
    assert "Cannot write" in refused(tmp_path, "calibrate", "--weights", home, "--run", in_the_way / "run")


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


def test_a_flipped_byte_in_what_is_kept_gives_the_same_plan_and_the_log_says_so(
    home: Path, run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = (run_copy / "plan.safetensors").read_bytes()
    again = ("calibrate", "--weights", home, "--run", run_copy, "-q")
    spoilt = [run_copy / "calibration" / "0000.safetensors", *sorted((run_copy / "blocks").glob("*.safetensors"))[:2]]
    for file in spoilt:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    for name in ("plan.safetensors", "plan.json"):
        (run_copy / name).unlink()
    result = gaq(*again)
    assert result.exit_code == 0, result.output
    assert (run_copy / "plan.safetensors").read_bytes() == plan
    for file in spoilt:
        assert f"{file} is damaged, altered or of another version: it is made again." in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--model", "ddpm-mnist", "--run", "run"),
        ("compare", "ddpm-mnist"),
        ("inspect", "run"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(tmp_path, *words, "--device", "cuda")
    assert line.startswith("error: Found --device cuda, but ")
    assert line.endswith("; see `gaq-export doctor`, or use --device cpu.")
