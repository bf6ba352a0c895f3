"""A model with prompts and latents goes through every command: engine, samples, pack and server."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.images import read_metadata
from gaq_export.models import text_encoder
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.run import Run
from gaq_export.sharing import pack, triton_repository
from tests.gaq_export.commands import gaq
from tests.gaq_export.sharing.test_triton_repository import draw_by_client, serving

PROMPTS = ["a cat", "the dog, at night"]


def test_commands_take_prompts(text_pipeline: Callable[[bool], Path], tmp_path: Path) -> None:
    prompts, other, run, engine = (tmp_path / name for name in ("prompts.txt", "other.txt", "run", "unet.plan"))
    prompts.write_text("a cat\n\nthe dog, at night\n")
    other.write_text("an elk\n")
    words = (
        "--weights",
        text_pipeline(False),
        "--prompts",
        prompts,
        "--guidance",
        2,
        "--recipe",
        "rtn",
        "--run",
        run,
        "-q",
    )
    for command in (
        ("calibrate", *words),
        ("build-engine", "--run", run, "--backend", "openvino", "--steps", 3, "--out", engine, "-q"),
        ("sample", "--engine", engine, "-n", 2, "--out", tmp_path / "own", "-q"),
        ("sample", "--engine", engine, "-n", 2, "--prompts", other, "--out", tmp_path / "other", "-q"),
    ):
        done = gaq(*command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "own" / "000001-the-dog-at-night.png").is_file()
    drawn = [read_metadata(tmp_path / "other" / f"00000{seed}-an-elk.png")["condition"] for seed in (0, 1)]
    assert drawn == ["an elk", "an elk"]
    pixels = [Image.open(path).tobytes() for path in sorted(tmp_path.glob("o*/000000-*.png"))]
    assert pixels[0] != pixels[1]
    for text, message in ((" \n", "holds no prompts"), (None, "Cannot read the prompts")):
        file = tmp_path / "empty.txt"
        file.unlink(missing_ok=True) if text is None else file.write_text(text)
        failed = gaq("sample", "--engine", engine, "--prompts", file, "--out", tmp_path / "none")
        assert failed.exit_code == 2
        assert message in failed.stderr


@pytest.fixture(scope="module")
def prompted(text_pipeline: Callable[[bool], Path], tmp_path_factory) -> tuple[LoadedModel, Path]:
    """A model of two text encoders and a decoder that takes prompts, and a folder with its run, engine and images."""
    model, folder = load_model(weights=text_pipeline(True)), tmp_path_factory.mktemp("prompted")
    model = replace(model, conditioning=text_encoder.prompt_conditioning(model, PROMPTS[:2], 2.0))
    spec = replace(model.spec.sampler, steps=2)
    pipeline.calibrate(model, pipeline.preset("tiny", CalibrationOptions(wbits=8)), folder=folder / "run", sampler=spec)
    config = EngineConfig(backend="onnxruntime", threads=1)
    pipeline.build_engine(folder=folder / "run", out=folder / "unet.plan", config=config, model=model)
    pipeline.sample(folder / "unet.plan", num=3, out=folder / "own")
    return model, folder


def test_a_pack_has_encoders_and_decoder_too(prompted: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    model, folder = prompted
    pack.write_pack(Run(folder=folder / "run"), tmp_path / "pack", model=model)
    engine, words = tmp_path / "unet.plan", ("--backend", "onnxruntime", "--threads", 1, "-q")
    (tmp_path / "elk.txt").write_text("an elk\n")
    for command in (
        ("build-engine", "--weights", tmp_path / "pack", "--run", tmp_path / "run", "--out", engine, *words),
        ("sample", "--engine", engine, "-n", 3, "--out", tmp_path / "drawn", "-q"),
        ("sample", "--engine", engine, "-n", 1, "--prompts", tmp_path / "elk.txt", "--out", tmp_path / "elk", "-q"),
    ):
        done = gaq(*command)
        assert done.exit_code == 0, done.output
    names = [path.name for path in sorted((folder / "own").glob("0*.png"))]
    assert len(names) == 3
    for name in names:
        assert torch.equal(_pixels(folder / "own" / name), _pixels(tmp_path / "drawn" / name))
    assert (tmp_path / "elk" / "000000-an-elk.png").is_file()


def test_a_server_has_encoders_and_a_decoder_beside_the_steps(
    prompted: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    (model, folder), served = prompted, tmp_path / "served"
    triton_repository.write(folder / "run", served, triton_repository.ServingOptions(largest_batch=2), model=model)
    assert {path.name for path in (served / "models").iterdir()} == {"unet", "decoder", "text", "text-2"}
    (tmp_path / "other.txt").write_text("\nan elk\n")
    with serving(served) as (address, models):
        draw_by_client(served, tmp_path / "drawn", "--url", address, "--num", 3)
        assert models["decoder"].batches == [2, 1]
        assert models["unet"].batches == [2, 2, 1, 1]
        assert models["text"].batches == models["text-2"].batches == [2, 1]  # the prompts, and nothing
        other = ("--url", address, "--num", 1, "--prompts", tmp_path / "other.txt", "--guidance", 3)
        draw_by_client(served, tmp_path / "other", *other)
    found = [_pixels(path) for path in sorted((tmp_path / "drawn").iterdir())]
    for own, drawn in zip(sorted((folder / "own").glob("0*.png")), found, strict=True):
        assert (_pixels(own) - drawn).abs().max() <= 1  # batches of another size
    assert (_pixels(tmp_path / "other" / "000000.png") - found[0]).abs().max() > 1


def _pixels(path: Path) -> torch.Tensor:
    return torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int64)
