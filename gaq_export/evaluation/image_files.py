"""Images in files that anybody may have made, PNGs and the arrays of an .npz: read as pictures, or refused in one line.

What a file says of its size is compared with what it holds before any memory is taken for it, pipes and folders are
not opened, and no format but the two is tried, because some of Pillow's others run programs.
"""

import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from gaq_export.errors import GaqError, one_line

_GREY = ("1", "L")  # modes of Pillow
_COLOURS = ("P", "PA", "LA", "RGB", "RGBA")  # palettes, alpha channels and the like become three colours


def read_png(path: Path) -> Tensor:
    """Return a picture as (C, H, W) uint8 of one or three channels.

    Raises:
        GaqError: it is no whole PNG of 8 bits a channel, or has more pixels than Pillow takes (90 million).
    """
    if not path.is_file():
        raise GaqError(f"{path} is no file but a folder, a pipe or a broken link: take it out of the images.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as picture:
                mode = picture.mode
                if mode in (*_GREY, *_COLOURS):
                    array = np.array(picture.convert("L" if mode in _GREY else "RGB"))
    # What Pillow raises depends on where the file breaks off.
    except Exception as error:
        raise GaqError(f"{path} cannot be read as a PNG: {one_line(error)}") from error
    if mode not in (*_GREY, *_COLOURS):
        raise GaqError(f"{path} is a picture of mode {mode!r}; expected 8 bits a channel. Convert it.")
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


def read_images(path: Path, names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return the first of these arrays that an .npz holds, as images (N, H, W, C) of one or three channels.

    Raises:
        GaqError: the file is damaged, has none of them, or the array holds anything but uint8 images.
    """
    array = _read_array(path, names)
    shape = array.shape
    array = array[..., None] if array.ndim == 3 else array  # grey images may come without a channel
    if array.dtype != np.uint8 or array.ndim != 4 or 0 in shape or array.shape[3] not in (1, 3):
        raise GaqError(
            f"{path} has an array of {array.dtype} {shape}; expected images of uint8, (N, H, W), (N, H, W, 1) or "
            "(N, H, W, 3), at least one."
        )
    return array


def read_labels(path: Path, names: Sequence[str], count: int) -> Tensor:
    """Return the first of these arrays that an .npz holds as classes (N,) int64; raise GaqError if it is none."""
    array = _read_array(path, names)
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,) or array.min() < 0:
        raise GaqError(f"{path} has labels of {array.dtype} {array.shape}; expected {count} whole numbers from 0 on.")
    return torch.from_numpy(array.astype(np.int64))


def _read_array(path: Path, names: Sequence[str]) -> npt.NDArray[Any]:
    wanted = " or ".join(f"`{name}`" for name in names)
    if not path.is_file():
        raise GaqError(f"{path} is not there, or is no file: give an .npz with {wanted}.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            name = next((name for name in names if f"{name}.npy" in members), None)
            if name is not None:
                _check_size(archive, members[f"{name}.npy"])
                with archive.open(f"{name}.npy") as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
    # What zipfile and NumPy raise depends on where the file is damaged.
    except Exception as error:
        raise GaqError(f"{path} cannot be read as an .npz with {wanted}: {one_line(error)}") from error
    raise GaqError(f"{path} cannot be read as an .npz with {wanted}: it holds {sorted(members)[:5]}.")


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError if an array's header says another size than follows it: NumPy would take memory for that."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        declared, held = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read because they could run code")
    if declared != held:
        raise ValueError(f"its header says {shape} {dtype}, {declared} bytes, but {held} bytes follow")
