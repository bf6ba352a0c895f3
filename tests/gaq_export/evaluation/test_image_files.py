"""Foreign images are read as pictures, or refused in the one line that `evaluate` prints."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from PIL import Image

from calib.errors import CalibError
from calib.files import write_checked
from gaq_export import images
from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet
from gaq_export.evaluation.image_sets import open_images
from gaq_export.sampling import shards
from tests.gaq_export.commands import refused

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
NOT_IMAGES = r"has an array of \S+ \(.*\); expected images of uint8, \(N, H, W\), \(N, H, W, 1\) or \(N, H, W, 3\)"
DAMAGED = "cannot be read as an .npz with `train_images` or `images`: "


def npz(array: np.ndarray, *, name: str = "images", compress: bool = True) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **{name: array})
    return file.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def lying(shape: tuple[int, ...]) -> bytes:
    """Return an .npz whose header promises more than follows."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return zipped(header.getvalue() + b"\0" * 8)


def zipped(member: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", member)
    return file.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", f"{DAMAGED}File is not a zip file", id="empty"),
        pytest.param(npz(PICTURES)[:-30], f"{DAMAGED}File is not a zip file", id="truncated"),
        pytest.param(npz(PICTURES)[200:], DAMAGED, id="without its beginning"),
        pytest.param(flipped(npz(PICTURES), 300), DAMAGED, id="a flipped byte inside, compressed"),
        pytest.param(flipped(npz(PICTURES, compress=False), 300), f"{DAMAGED}Bad CRC-32", id="a flipped byte inside"),
        pytest.param(flipped(npz(PICTURES), 2), DAMAGED, id="a flipped byte in front"),
        pytest.param(as_npy(PICTURES), f"{DAMAGED}File is not a zip file", id="an .npy, renamed"),
        pytest.param(npz(np.array([{}], dtype=object)), f"{DAMAGED}it holds Python objects", id="objects"),
        pytest.param(npz(PICTURES, name="x"), rf"{DAMAGED}it holds \['x.npy'\]", id="other arrays"),
        pytest.param(zipped(b"\x93NUMPY\x01\0\x10\0{'descr': '|u1', " + b"(" * 60), DAMAGED, id="a header of nonsense"),
        pytest.param(
            lying((4000, 10**12)),
            f"{DAMAGED}its header says .*4000000000000000 bytes, but 8 bytes follow",
            id="4e15 bytes",
        ),
        pytest.param(lying((-1, 8, 8)), f"{DAMAGED}its header says", id="a negative size"),
        *(
            pytest.param(npz(array), NOT_IMAGES, id=name)
            for name, array in {
                "no image": PICTURES[:0],
                "height 0": PICTURES[:, :0],
                "0 axes": PICTURES[0, 0, 0, 0],
                "1 axis": PICTURES[0, 0, 0],
                "2 axes": PICTURES[0, 0],
                "5 axes": PICTURES[None],
                "7 channels": np.zeros((4, 8, 8, 7), np.uint8),
                "0 channels": PICTURES[..., :0],
                "floats": PICTURES / 255,
                "values that are not finite": np.full((4, 8, 8, 3), np.nan),
                "strings": np.array(["a", "b"]),
                "16 bits": PICTURES.astype(np.uint16),
            }.items()
        ),
    ],
)
def test_arrays_that_are_no_images_are_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    for read in (open_images, lambda path: frechet.load_images(path, "test", (3, 8, 8))):
        with pytest.raises(GaqError, match=words.replace("`train_images` or `images`", ".*")) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(3, np.int64), r"labels of int64 \(3,\); expected 4 whole numbers from 0 on"),
        (np.zeros((4, 1), np.int64), r"labels of int64 \(4, 1\)"),
        (np.zeros(4), "labels of float64"),
        (np.full(4, -1), "labels of int64"),
        (np.array(["a"] * 4), "labels of <U1"),
    ],
)
def test_labels_that_are_none_are_one_line(labels: np.ndarray, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PICTURES, labels=labels)
    with pytest.raises(GaqError, match=words):
        frechet.load_images(tmp_path / "x.npz", "test", (3, 8, 8))


def test_labels_beyond_the_digits_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_images=PICTURES[..., 0], train_labels=np.full(4, 10))
    with pytest.raises(GaqError, match="The training labels go up to 10; expected digits, 0 to 9"):
        frechet.digit_net(tmp_path / "net.safetensors", tmp_path / "x.npz", (1, 32, 32))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a grey PNG of any declared size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def whole() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, "JPEG")
    return file.getvalue()


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def contents(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(Path.mkdir, "is no file but a folder, a pipe or a broken link", id="a folder"),
        pytest.param(os.mkfifo, "is no file but a folder, a pipe or a broken link", id="a pipe"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "is no file but a folder", id="a broken link"),
        pytest.param(lambda path: path.symlink_to(path), "is no file but a folder", id="a circle of links"),
        pytest.param(contents(b""), "cannot be read as a PNG: cannot identify image file", id="empty"),
        pytest.param(contents(whole()[:-40]), "cannot be read as a PNG: .*truncated", id="truncated"),
        pytest.param(contents(whole()[:20]), "cannot be read as a PNG: ", id="truncated in its header"),
        pytest.param(contents(flipped(whole(), 60)), "cannot be read as a PNG: ", id="a flipped byte"),
        pytest.param(contents(png(60000, 60000)), "cannot be read as a PNG: .*3600000000 pixels", id="60000 x 60000"),
        pytest.param(contents(png(10000, 10000)), "cannot be read as a PNG: .*100000000 pixels", id="10000 x 10000"),
        pytest.param(contents(png(0, 8)), "cannot be read as a PNG: ", id="width 0"),
        pytest.param(contents(jpeg()), "cannot be read as a PNG: cannot identify image file", id="a JPEG"),
        pytest.param(
            contents(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "cannot identify", id="PostScript"
        ),
        pytest.param(contents(deep()), "is a picture of mode 'I;16'; expected 8 bits a channel", id="16 bits"),
        pytest.param(contents(png(9, 8, b"\0" * 80)), "holds images of different sizes", id="another size"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_picture_among_pngs_is_one_line(
    first: bool, make: Callable[[Path], object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaq_export.evaluation.image_sets.PART", 2)  # sizes must agree across parts too
    for name in "bcd":
        (tmp_path / f"{name}.png").write_bytes(whole())
    make(tmp_path / ("a.png" if first else "e.png"))
    with pytest.raises(GaqError, match=words) as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value)


def test_pictures_of_usual_kinds_are_read(tmp_path: Path) -> None:
    for mode, channels in {"1": 1, "L": 1, "P": 3, "LA": 3, "RGB": 3, "RGBA": 3}.items():
        (tmp_path / mode).mkdir()
        Image.fromarray(PICTURES[0]).convert(mode).save(tmp_path / mode / "x.png")
        assert open_images(tmp_path / mode).shape == (channels, 8, 8)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no images"),
        ({"images": torch.zeros(2, dtype=torch.uint8)}, r"holds images of torch.uint8 \(2,\)"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)}, r"holds images of torch.bfloat16 \(2, 1, 8, 8\)"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "holds images of torch.float32"),
        ({"images": torch.zeros(2, 1, 0, 8, dtype=torch.uint8)}, r"\(2, 1, 0, 8\); expected uint8 \(N, C, H, W\)"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "does not hold the 2 images of seeds 0 to 1"),
        (
            {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "seeds": torch.arange(3)},
            "does not hold the 2 images of seeds 0 to 1",
        ),
    ],
)
def test_shards_of_another_type_are_one_line(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    shards.claim(tmp_path, shards.Order(num=2, seed=0, shard=2, batch=1, identity={}))
    write_checked(shards.shard_path(tmp_path, 0), tensors)
    with pytest.raises(CalibError, match=rf"{words}.* The same `sample` command draws it again"):
        open_images(tmp_path)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    images.save_png(tmp_path / "pictures" / "a.png", torch.zeros(3, 8, 8), {})
    os.mkfifo(tmp_path / "pictures" / "b.png")
    line = refused(
        tmp_path / "pictures", "evaluate", *[tmp_path / "pictures"] * 2, "--features", "digits", "--out", tmp_path, "-q"
    )
    assert line == (
        f"error: {tmp_path}/pictures/b.png is no file but a folder, a pipe or a broken link: take it out of the images."
    )
