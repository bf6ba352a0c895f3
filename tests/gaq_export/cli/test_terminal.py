"""What commands print: the audit of a real engine, counted again; an evaluation; machines with and without GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest

from calib.plan import load_plan
from engines import EngineFile, PortabilityCost, Portable
from engines.driver import Gpu
from engines.machine import Machine
from gaq_export.cli import terminal
from gaq_export.cli.doctor import Diagnosis
from gaq_export.deploy.build import Built
from gaq_export.deploy.parity import Parity, Tolerance
from gaq_export.deploy.record import record_of
from gaq_export.deploy.submodels import Part
from gaq_export.evaluation.evaluate import Evaluation
from gaq_export.evaluation.scores import Score

GPU = Gpu(name="H100", capability="9.0", memory_bytes=80 << 30, cuda="13.0")
MACHINE = Machine(processor="a processor", features=("avx2",), gpus=(GPU,), packages={"torch": "2.9", "ray": None})


@pytest.fixture
def parity() -> Parity:
    """Three checked steps, of which the one with the highest SQNR is the closest to its limit."""
    tolerance = Tolerance(floor_db=29.0, margin_db=3.0)
    return Parity(steps=(0, 5, 9), sqnr_db=(20.0, 30.0, 25.0), resolution_db=(10.0, 40.0, 10.0), tolerance=tolerance)


@pytest.fixture
def built(tiny_step_engine: EngineFile, tiny_run: Path, parity: Parity) -> Built:
    """The tiny engine of steps."""
    plan = load_plan(tiny_run / "plan.safetensors")
    return Built(file=tiny_step_engine, others=(), plan=plan, parity=parity, not_run=None)


def test_the_lines_of_an_audit_add_up(built: Built) -> None:
    lines = terminal.audit_lines(built)
    tables, total = len(record_of(built.file).tables), len(built.plan.layers)
    assert lines[0].startswith("weights: ")
    assert f"{built.file.audit.total_weight_bytes / 1e6:.2f} MB in all" in lines[0]
    assert lines[1] == f"{tables} layers depend on the step alone and are tables"
    assert lines[2] == f"in int8 arithmetic: {total} of the plan's {total} layers"
    kept = lines[3].removeprefix("kept float by the plan: ").split("; ")
    assert sum(int(part.partition(" x ")[0]) for part in kept) == len(built.plan.float_layers)
    assert lines[4] == (
        "against fake-quantized PyTorch: median SQNR 25.0 dB over 3 steps; closest to its limit at step "
        "5: 30.0 dB, 29.0 dB required"
    )


def test_other_engines_parts_and_why_it_did_not_run_are_named(built: Built, parity: Parity) -> None:
    part = Part(file=built.file, parity=None)
    more = replace(
        built, others=(built.file,), decoder=part, texts=(replace(part, parity=parity),), parity=None, not_run="no GPU"
    )
    cost = PortabilityCost(bytes=2_000_000, plain_bytes=1_500_000)
    portable = replace(built.file, portable=(Portable.GPU,), audit=replace(built.file.audit, portability=cost))
    line = "portable (gpu): 2.00 MB in place of 1.50; time not measured, since it cannot run here"
    assert line in terminal.audit_lines(replace(built, file=portable))
    assert terminal.audit_lines(more)[4:] == [
        "unet.plan takes over where W4A8 is enough",
        "unet.plan makes images of the latents, in float32",
        "unet.plan encodes prompts, in float32; against PyTorch: 20.0 dB",
        "not run here: no GPU",
    ]


def test_an_evaluation_has_a_column_for_each_set_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    def scores(value: float) -> list[Score]:
        return [
            Score(metric="fd", name="Frechet distance", value=value, low=1.0, high=9.0, context={}),
            Score(metric="score", name="class score", value=2.0, context={}),
        ]

    terminal.print_evaluation(
        Evaluation(
            rows={"float": scores(4.0), "W4A8": scores(5.0)},
            steps={"W4A8": {"float trajectory": [20.0, 30.0]}},
            left_out=("ssim needs scikit-image",),
            path=Path("evaluation.json"),
        )
    )
    shown = capsys.readouterr().out
    assert [word for word in shown.splitlines()[1].split() if word in ("float", "W4A8")] == ["float", "W4A8"]
    assert "4 [1, 9]" in shown
    assert "W4A8: SQNR of the predicted noise, mean over steps: 25.0 dB on the float trajectory\n" in shown
    assert shown.endswith("left out: ssim needs scikit-image\n")


def test_a_machine_is_described_by_what_it_has() -> None:
    assert terminal.machine_lines(MACHINE) == [
        "processor: a processor; avx2",
        "GPU: H100, compute capability 9.0, 80 GiB, CUDA 13.0",
        "note: tensorrt-rtx does not run on the H100 (compute capability 9.0): use tensorrt",
        "installed: torch 2.9",
    ]
    bare = replace(MACHINE, features=None, gpus=())
    assert terminal.machine_lines(bare)[:2] == ["processor: a processor; unknown", "GPU: no NVIDIA driver or no GPU"]
    assert terminal.machine_lines(replace(bare, features=()))[0].endswith("; none that matter")


def test_what_keeps_a_backend_from_building_and_running_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    backends = {"tensorrt": ("no driver", "no driver"), "openvino": (None, None)}
    terminal.print_diagnosis(Diagnosis(machine=MACHINE, backends=backends, best=None, pytorch="2.9, computes on cpu"))
    shown = capsys.readouterr().out
    assert shown.count("no driver") == 1
    assert "build-engine takes: nothing, see above\n" in shown
