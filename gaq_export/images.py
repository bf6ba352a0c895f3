"""Images: PNG files that carry how they were made, grids to look at, and the PSNR between images.

In: images in [-1, 1], (C, H, W) or (N, C, H, W), with one or three channels. Out: PNG files, or decibels.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from calib.files import write_atomically
from gaq_export.errors import GaqError, one_line

METADATA_KEY = "gaq-export"
# Of a grid, in pixels.
_GAP = 4
_SMALLEST_SIDE = 96  # images smaller than this are enlarged
_HEAD_HEIGHT = 20


def to_uint8(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Round images to the bytes that a PNG file holds.

    Args:
        images: (..., C, H, W) in [-1, 1]; values outside are clamped.

    Returns:
        (..., H, W, C), 0 to 255.

    Raises:
        GaqError: there are other than one or three channels, or a value is not finite.
    """
    if images.dim() < 3 or images.shape[-3] not in (1, 3):
        raise GaqError(f"An image needs 1 or 3 channels, (C, H, W); found shape {tuple(images.shape)}.")
    if not bool(images.isfinite().all()):
        raise GaqError("The image holds NaN or infinite values, so there is no picture to write.")
    scaled = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: npt.NDArray[np.uint8] = scaled.movedim(-3, -1).numpy()  # (..., C, H, W) -> (..., H, W, C)
    return array


def to_uint8_tensor(images: torch.Tensor) -> torch.Tensor:
    """Round images (N, C, H, W) in [-1, 1] to what a PNG file holds, uint8 (N, C, H, W), so that all sets are alike."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


def save_png(path: Path, image: torch.Tensor, metadata: Mapping[str, Any]) -> None:
    """Write one image as a PNG that carries how it was made.

    Args:
        path: file to write; it appears whole or not at all.
        image: (C, H, W) in [-1, 1].
        metadata: how it was made; written as JSON to the text chunk "gaq-export".

    Raises:
        GaqError: the image cannot be converted, see `to_uint8`.
    """
    _write(path, _to_pil(to_uint8(image)), metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `save_png` wrote beside the pixels.

    Raises:
        GaqError: the file cannot be read as an image, or was not written by this tool.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            fields = json.loads(picture.info[METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise GaqError(f"{path} carries no {METADATA_KEY!r} text, so it was not written by this tool.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise GaqError(f"{path} cannot be read as an image: {one_line(error)}") from error
    return dict(fields)


def save_grid(
    path: Path,
    rows: Sequence[tuple[str, torch.Tensor]],
    metadata: Mapping[str, Any] | None = None,
    titles: Sequence[str] = (),
) -> None:
    """Write labelled rows of images as one PNG, small images enlarged to whole multiples.

    Args:
        path: file to write; it appears whole or not at all.
        rows: label and images (N, C, H, W) of each row; all images of one size, rows may differ in length.
        metadata: how they were made, as for `save_png`.
        titles: of the columns; each is cut to its column's width.

    Raises:
        GaqError: there are no images, their sizes differ, or one cannot be converted.
    """
    sizes = {tuple(images.shape[-2:]) for _, images in rows}
    if len(sizes) != 1 or any(images.dim() != 4 or len(images) == 0 for _, images in rows):
        shapes = [tuple(images.shape) for _, images in rows]
        raise GaqError(f"A grid needs rows of images (N, C, H, W), all of one height and width; found {shapes}.")
    height, width = sizes.pop()
    factor = max(1, _SMALLEST_SIDE // max(height, width))
    cell_h = height * factor + _GAP
    cell_w = width * factor + _GAP
    font = ImageFont.load_default(size=13)
    labels = [max((font.getlength(line) for line in label.splitlines()), default=0) for label, _ in rows]
    margin = int(max(labels)) + 2 * _GAP
    columns = max(len(images) for _, images in rows)
    head = _HEAD_HEIGHT if titles else 0
    sheet = Image.new("RGB", (margin + columns * cell_w, head + len(rows) * cell_h + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        middle = margin + column * cell_w + width * factor / 2
        text = _shortened(title, font, width * factor)
        draw.text((middle, _GAP + head / 2), text, fill="black", font=font, anchor="mm")
    for row, (label, images) in enumerate(rows):
        top = head + row * cell_h + _GAP
        draw.multiline_text((_GAP, top + cell_h / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(to_uint8(images)):
            # Nearest, so that an enlarged pixel stays a pixel and a reader sees what was drawn.
            picture = _to_pil(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * cell_w, top))
    _write(path, sheet, metadata or {})


def encode_side_by_side(images: Sequence[torch.Tensor]) -> bytes:
    """Return the bytes of a PNG of images (C, H, W) in [-1, 1], not enlarged, with a white line between them."""
    line = images[0].new_ones(*images[0].shape[:2], 1)  # (C, H, 1)
    row = torch.cat([part for image in images for part in (line, image)][1:], dim=2)  # (C, H, N*W + N - 1)
    buffer = io.BytesIO()
    _to_pil(to_uint8(row)).save(buffer, format="PNG")
    return buffer.getvalue()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each pair of images, 10 log10(peak^2 / mean squared error).

    The peak is 2, the full range from -1 to 1.

    Args:
        a: images in [-1, 1], (N, C, H, W).
        b: images of the same shape.

    Returns:
        decibels, (N,) float64; infinite where two images are equal.

    Raises:
        GaqError: the shapes differ.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise GaqError(f"PSNR compares batches (N, C, H, W) of one shape; found {tuple(a.shape)}, {tuple(b.shape)}.")
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # (N, C, H, W) -> (N,)
    return 10 * torch.log10(4 / error)  # 4 = 2 ** 2


def _shortened(text: str, font: Any, width: float) -> str:
    """Return the text, cut with an ellipsis if it is wider than `width` pixels."""
    while font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _to_pil(array: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _write(path: Path, picture: Image.Image, metadata: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
