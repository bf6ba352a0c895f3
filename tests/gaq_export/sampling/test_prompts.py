"""What an engine is asked to draw: obeyed, or refused where its network does not take it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import engines
from gaq_export.deploy.record import record_of
from gaq_export.errors import GaqError
from gaq_export.images import read_metadata
from gaq_export.models.conditioning_request import ConditioningRequest
from gaq_export.sampling.prompts import condition_engine
from tests.gaq_export.commands import gaq, refused
from tests.gaq_export.models.test_architectures import SMALL


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, write_tiny_folder) -> Path:
    """A folder with a U-Net of ten classes and an unconditional one."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return write_tiny_folder(UNet2DModel(**SMALL, **blocks, num_class_embeds=11), tmp_path_factory.mktemp("home") / "d")


@pytest.fixture(scope="module")
def engine(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of steps with guidance 3, on classes 0, 4 and 7."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("engine") / "unet.plan"
    words = (
        "--weights",
        labelled,
        "--classes",
        "0,4,7",
        "--guidance",
        3,
        "--recipe",
        "rtn",
        "--wbits",
        6,
        "--run",
        run,
        "-q",
    )
    made = gaq("calibrate", *words)
    assert made.exit_code == 0, made.output
    again = refused(run, "calibrate", *words[:4], *words[6:], "--guidance", 2)
    assert "holds a run with other settings (guidance: 3.0, now 2.0)" in again
    built = gaq("build-engine", "--run", run, "--backend", "openvino", "--steps", 4, "--out", out, "-q")
    assert built.exit_code == 0, built.output
    return out


def test_samples_record_their_condition_and_obey_the_options(engine: Path, tmp_path: Path) -> None:
    first = gaq("sample", "--engine", engine, "-n", 4, "--out", tmp_path / "own", "-q", "--compare")
    assert first.exit_code == 0, first.output
    names = sorted(path.name for path in (tmp_path / "own").glob("0*[0-9].png"))
    assert names == ["000000-0.png", "000001-4.png", "000002-7.png", "000003-0.png"]
    assert read_metadata(tmp_path / "own" / "000001-4.png")["condition"] == "4"
    record = json.loads((tmp_path / "own" / "samples.json").read_text())
    assert (record["conditioning"], record["guidance"]) == (["0", "4", "7"], 3.0)
    assert min(image["psnr_db"] for image in record["images"]) > 10

    def drawn(folder: str, *words: object) -> bytes:
        made = gaq("sample", "--engine", engine, "-n", 2, "--out", tmp_path / folder, "-q", *words)
        assert made.exit_code == 0, made.output
        return Image.open(next((tmp_path / folder).glob("000001-4.png"))).tobytes()

    own = Image.open(tmp_path / "own" / "000001-4.png").tobytes()
    assert drawn("same", "--classes", "9,4") == own  # whoever is beside it
    assert drawn("plain", "--guidance", 1) != own  # the scale is an input
    conditioning = condition_engine(engines.load_engine_file(engine), ConditioningRequest(guidance=1.0))
    assert conditioning is not None
    assert conditioning.feeds((0,)).keys() >= GUIDED
    streamed = gaq(
        "sample", "--engine", engine, "-n", 2, "--shard", 2, "--classes", "9,4", "--out", tmp_path / "s", "-q"
    )
    assert streamed.exit_code == 0, streamed.output
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["identity"]["conditioning"] == ["9", "4"]


GUIDED = {"class_labels", "unconditional_class_labels", "guidance"}


def test_an_engine_refuses_a_condition_it_does_not_take(engine: Path, tmp_path: Path) -> None:
    words = ("sample", "--engine", engine, "-n", 1, "--out", tmp_path / "samples")
    assert "numbers of 0 to 9" in refused(tmp_path, *words, "--classes", "10")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    assert "takes classes, not prompts" in refused(tmp_path, *words, "--prompts", prompts)
    file = engines.load_engine_file(engine)
    record = record_of(file)
    unguided = {**record.provenance.conditioning, "guidance": 1.0}
    record = replace(record, provenance=replace(record.provenance, conditioning=unguided))
    with pytest.raises(GaqError, match="has no guidance: calibrate with --guidance 2, and build again"):
        condition_engine(replace(file, metadata=record.to_json()), ConditioningRequest(guidance=2.0))
