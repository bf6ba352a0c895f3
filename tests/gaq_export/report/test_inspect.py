"""Inspecting a run: which page is written where, and what is refused before anything is measured."""

import shutil
from pathlib import Path

import pytest

from calib.errors import CalibError
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.report.inspect import inspect
from tests.gaq_export.outline import outline


def test_the_page_lies_in_the_run_folder_and_is_about_the_block_asked_for(
    tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    stages: list[str] = []
    block = "unet.down_blocks.0.resnets.0"
    path = inspect(
        folder=run, block=block, images=1, model=tiny_model, on_step=lambda what, done, total: stages.append(what)
    )
    assert path == run / "inspect.html"
    assert f"Block {block}, " in outline(path.read_text(encoding="utf-8")).text
    assert stages[0] == "comparing gradients, block"
    assert {"following fresh trajectories, step", "quantizing one layer alone"} < set(stages)
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []  # scratch files are gone


def test_a_run_without_a_plan_is_refused(tmp_path: Path, tiny_model: LoadedModel) -> None:
    with pytest.raises(CalibError, match=r"plan\.safetensors"):
        inspect(folder=tmp_path, model=tiny_model)


def test_no_images_is_an_error(tiny_run: Path, tiny_model: LoadedModel) -> None:
    with pytest.raises(GaqError, match="Found 0 images to measure with; ask for 1 or more"):
        inspect(folder=tiny_run, images=0, model=tiny_model)
    assert not (tiny_run / "inspect.html").exists()
