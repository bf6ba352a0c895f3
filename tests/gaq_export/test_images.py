"""PNG files and grids: what is written is what was drawn, and PSNR is what its formula says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gaq_export.errors import GaqError
from gaq_export.images import psnr, read_metadata, save_grid, save_png, to_uint8


def test_the_range_of_bytes_is_the_range_of_images() -> None:
    image = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_every_byte_survives_the_way_there_and_back() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    image = torch.from_numpy(grey.astype(np.float32) / 127.5 - 1).movedim(-1, 0)
    assert np.array_equal(to_uint8(image), grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_and_how_they_were_made(tmp_path: Path, channels: int) -> None:
    image = torch.rand(channels, 8, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / "new" / "0.png"
    save_png(path, image, {"seed": 7, "model": "tiny"})
    with Image.open(path) as picture:
        assert json.loads(picture.info["gaq-export"]) == {"model": "tiny", "seed": 7}
        assert np.array_equal(np.asarray(picture).reshape(8, 9, channels), to_uint8(image))
    assert read_metadata(path) == {"model": "tiny", "seed": 7}
    assert [file.name for file in path.parent.iterdir()] == ["0.png"]


def test_a_failed_write_keeps_the_picture_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    save_png(path, torch.zeros(1, 4, 4), {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_png(path, torch.ones(1, 4, 4), {"not json": object()})
    with pytest.raises(GaqError, match="NaN"):
        save_png(path, torch.full((1, 4, 4), torch.nan), {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ""] == ["0.png"]


def test_a_picture_from_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.png"
    Image.new("L", (4, 4)).save(foreign)
    with pytest.raises(GaqError, match=r"foreign\.png carries no 'gaq-export' text"):
        read_metadata(foreign)
    foreign.write_bytes(b"no picture")
    with pytest.raises(GaqError, match=r"foreign\.png cannot be read as an image"):
        read_metadata(foreign)


def test_a_grid_enlarges_small_images_and_keeps_their_pixels(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    black, white = torch.full((2, 1, 32, 32), -1.0), torch.ones(3, 3, 32, 32)
    save_grid(path, [("float", black), ("engine\nW4A8", white)])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    # Two rows of 96 pixels with gaps of 4; three columns right of the labels.
    assert pixels.shape[0] == 2 * 100 + 4
    assert pixels.shape[1] > 3 * 100
    first_row = pixels[4 + 48]
    assert (first_row == 0).all(axis=-1).sum() >= 2 * 96
    assert (pixels[104:200, -100:-4] == 255).all()


def test_a_grid_leaves_large_images_at_their_size(tmp_path: Path) -> None:
    save_grid(tmp_path / "grid.png", [("", torch.zeros(1, 3, 128, 128))])
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.height == 128 + 2 * 4


def test_a_grid_refuses_rows_that_do_not_fit(tmp_path: Path) -> None:
    for rows in (
        [],
        [("a", torch.zeros(1, 1, 8, 8)), ("b", torch.zeros(1, 1, 16, 16))],
        [("a", torch.zeros(0, 1, 8, 8))],
    ):
        with pytest.raises(GaqError, match="A grid needs rows of images"):
            save_grid(tmp_path / "grid.png", rows)


def test_psnr_agrees_with_a_case_worked_by_hand() -> None:
    a = torch.zeros(3, 1, 2, 2)
    b = a.clone()
    b[0] = 0.2  # mean square 0.04, 10 log10(4 / 0.04) = 20 dB
    b[1, 0, 0, 0] = 0.4  # mean square 0.16 / 4 = 0.04, the same
    assert psnr(a, b).tolist() == [pytest.approx(20), pytest.approx(20), float("inf")]


def test_images_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(GaqError, match=r"1 or 3 channels.*\(2, 8, 8\)"):
        to_uint8(torch.zeros(2, 8, 8))
    with pytest.raises(GaqError, match=r"found \(1, 1, 8, 8\), \(2, 1, 8, 8\)"):
        psnr(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))
