"""`evaluate`, `inspect` and `report`: their options, and what they need of a run folder."""

from pathlib import Path

import pytest

from tests.gaq_export.commands import refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--block", "unet.mid_block.resnet.1"),
            "No block is called 'unet.mid_block.resnet.1'; 14 can be inspected. Did",
        ),
        (("--block", "unet.mid_block.resnet.1"), "Did you mean 'unet.mid_block.resnets.1'?"),
        (("--images", 0), "Invalid value for '--images': Input should be greater than or equal to 1."),
    ],
)
def test_a_wrong_option_of_inspect_is_one_line(words: tuple[object, ...], message: str, run_copy: Path) -> None:
    assert message in refused(run_copy, "inspect", run_copy, *words)


def test_inspect_needs_a_finished_run_and_a_place_to_write(run_copy: Path, in_the_way: Path) -> None:
    assert "Cannot write to" in refused(run_copy, "inspect", run_copy, "--out", in_the_way / "page.html")
    (run_copy / "run.json").unlink()
    assert "No record of a calibration in" in refused(run_copy, "inspect", run_copy)
    (run_copy / "plan.safetensors").unlink()
    line = refused(run_copy, "inspect", run_copy)
    assert f"No plan.safetensors in {run_copy}: run `gaq-export calibrate` first." in line


@pytest.mark.parametrize("words", [(), ("a.npz",), ("a.npz", "b.npz", "--engine", "unet.plan")])
def test_evaluate_takes_either_two_sets_of_images_or_engines(words: tuple[str, ...], tmp_path: Path) -> None:
    line = refused(tmp_path, "evaluate", *words, "--features", "digits")
    assert line == "error: Give two sets of images, or one or more --engine."
