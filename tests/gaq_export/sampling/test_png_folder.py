"""A folder of PNGs says how each picture was made and names it by its condition."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import EngineFile
from gaq_export.deploy.session import sampling_of
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.errors import GaqError
from gaq_export.images import read_metadata
from gaq_export.sampling.png_folder import Drawn, check_writable, write_overview, write_pngs

NAMES = ("A cat, at night!", "b" * 60)


@pytest.fixture
def conditioning() -> Conditioning:
    return Conditioning(names=NAMES, rows={"encoder_hidden_states": torch.ones(2, 3, 4)}, unconditional={})


def drawn(count: int, reference: bool) -> Drawn:
    images = torch.linspace(-1, 1, count * 64).reshape(count, 1, 8, 8)
    return Drawn(
        seeds=tuple(range(7, 7 + count)), images=images, reference=images * 0.9 if reference else None, seconds=1.5
    )


def test_each_picture_carries_what_it_depends_on(
    tiny_step_engine: EngineFile, conditioning: Conditioning, tmp_path: Path
) -> None:
    sampling = replace(sampling_of(tiny_step_engine), conditioning=conditioning)
    made = write_pngs(tmp_path, tiny_step_engine, sampling, drawn(2, reference=True))
    names = ["000007-" + "b" * 40 + ".png", "000008-a-cat-at-night.png"]  # seed s gets row s mod 2
    record = json.loads((tmp_path / "samples.json").read_text())
    assert [row["file"] for row in record["images"]] == names
    assert [row["condition"] for row in record["images"]] == [NAMES[1], NAMES[0]]
    assert (record["conditioning"], record["guidance"], record["seconds"]) == (list(NAMES), 1.0, 1.5)
    assert record["conditioning_sha256"] == conditioning.sha256
    facts = read_metadata(tmp_path / names[1])
    assert (facts["seed"], facts["condition"], facts["engine_sha256"]) == (8, NAMES[0], tiny_step_engine.sha256)
    assert read_metadata(tmp_path / "000008-a-cat-at-night-float.png")["backend"] == "float"
    assert made.psnr_db is not None
    assert [row["psnr_db"] for row in record["images"]] == [round(value, 3) for value in made.psnr_db]
    assert made.grid.is_file()


def test_without_a_condition_or_a_reference_there_is_neither_in_the_record(
    tiny_step_engine: EngineFile, tmp_path: Path
) -> None:
    made = write_pngs(tmp_path, tiny_step_engine, sampling_of(tiny_step_engine), drawn(1, reference=False))
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["images"] == [{"seed": 7, "file": "000007.png"}]
    assert not record.keys() & {"conditioning", "guidance", "decoder_sha256"}
    assert made.psnr_db is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007.png", "grid.png", "samples.json"]


def test_a_folder_of_shards_gets_a_grid_of_its_first_images(tiny_step_engine: EngineFile, tmp_path: Path) -> None:
    first = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    grid = write_overview(tmp_path, tiny_step_engine, sampling_of(tiny_step_engine), first, torch.arange(20))
    assert read_metadata(grid)["engine_sha256"] == tiny_step_engine.sha256


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GaqError, match=r"Cannot write to .*file: .*\. Choose a folder you may write to"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir()
