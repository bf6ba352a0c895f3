"""Sets of images, from wherever: the same pixels are the same set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calib.errors import CalibError
from calib.records import signed
from engines import EngineFile
from gaq_export import images, pipeline
from gaq_export.errors import GaqError
from gaq_export.evaluation.image_sets import open_images
from gaq_export.sampling import shards


def test_shards_and_pngs_of_one_drawing_are_the_same_set(tiny_step_engine: EngineFile, tmp_path: Path) -> None:
    pipeline.sample(tiny_step_engine.path, num=6, seed=3, batch=2, out=tmp_path / "pngs")
    pipeline.sample_shards(tiny_step_engine.path, num=6, seed=3, batch=2, shard=4, out=tmp_path / "shards")
    pngs, shards = (open_images(tmp_path / name) for name in ("pngs", "shards"))
    assert pngs.sha256 == shards.sha256
    assert (pngs.count, pngs.shape) == (shards.count, shards.shape) == (6, (1, 16, 16))
    assert [len(part) for part in shards.parts()] == [4, 2]
    assert (pngs.recorded["seed"], shards.recorded["seed"]) == (3, 3)
    assert pngs.recorded["engine_sha256"] == shards.recorded["engine_sha256"] == tiny_step_engine.sha256
    for size, sizes in ((2, [2, 2, 2]), (4, [4, 2]), (5, [5, 1]), (9, [6])):
        batches = list(shards.batches(size))
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(torch.cat(batches), torch.cat(list(pngs.parts())))
    first = shards.take(5)
    assert first.sha256 != shards.sha256
    assert torch.equal(torch.cat(list(first.parts())), torch.cat(list(pngs.parts()))[:5])
    with pytest.raises(GaqError, match="has 6 images; expected at least 7"):
        shards.take(7)


def test_shards_without_their_record_are_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    shards.shard_path(tmp_path, 0).touch()
    with pytest.raises(GaqError, match=r"holds shards, and no samples.json that says how many"):
        open_images(tmp_path)


def test_a_data_sets_training_images_are_padded_to_the_model(tmp_path: Path) -> None:
    train = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", train_images=train, test_images=train[:2])
    found = open_images(tmp_path / "digits.npz", (1, 32, 32))
    (part,) = found.parts()
    assert (found.count, found.shape, found.recorded) == (5, (1, 32, 32), {})
    assert np.array_equal(part[:, 0, 2:30, 2:30].numpy(), train)
    assert int(part[:, :, :2].sum()) == 0
    with pytest.raises(GaqError, match=r"has uint8 images \(28, 28, 1\); expected uint8 images \(3, 32, 32\)"):
        open_images(tmp_path / "digits.npz", (3, 32, 32))


def test_other_pngs_are_a_set_too_if_they_are_of_one_size(tmp_path: Path) -> None:
    images.save_png(tmp_path / "b.png", torch.zeros(3, 8, 8), {})
    images.save_png(tmp_path / "a.png", torch.ones(3, 8, 8), {})
    (part,) = open_images(tmp_path).parts()
    assert part[:, 0, 0, 0].tolist() == [255, 128]
    images.save_png(tmp_path / "c.png", torch.zeros(3, 8, 9), {})
    with pytest.raises(GaqError, match="holds images of different sizes"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "holds no images"), ("x.npz", "cannot be read as an .npz with `train_images`")]
)
def test_what_holds_no_images_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    with pytest.raises(GaqError, match=words):
        open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"seed": 1, "file": "/etc/hostname"}, "leads out of that folder"),
        ({"seed": 1, "file": "../a.png"}, "leads out of that folder"),
        ({"seed": 1}, "holds arrays, which are no pictures"),
        ({"seed": -1, "file": "a.png"}, "images.0.seed is -1"),
        ({"seed": "1", "file": "a.png"}, "images.0.seed is '1'"),
        ({"file": "a.png"}, "images.0.seed is missing"),
        ("a.png", "images.0 is 'a.png'"),
        (None, "images.0 is None"),
    ],
)
def test_a_row_of_pictures_of_another_form_is_one_line(row: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_bytes(signed({"model": "tiny", "images": [row]}))
    with pytest.raises((CalibError, GaqError), match=message) as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 100_000, "{}", '{"images": {}}', '{"images": []}'])
def test_a_record_of_pictures_of_another_form_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises((CalibError, GaqError), match=r"samples\.json"):
        open_images(tmp_path)
