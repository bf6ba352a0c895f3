"""Sets of images to evaluate: shards or PNGs that `sample` wrote, other PNGs, the .npz of a data set.

Only one part is in memory at a time. A set is identified by the sha256 of its pixels, wherever they are stored.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from calib.records import Seed, check_record
from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet, image_files
from gaq_export.folders import inside
from gaq_export.sampling import shards

_ADVICE = "Draw them again, or delete the record to evaluate all PNGs in the folder"
PART = 256  # images at a time
Parts = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images (N, C, H, W) uint8.

    Attributes:
        name: where they come from, for people.
        count: N.
        shape: (C, H, W).
        parts: yields them in order, (n, C, H, W) each.
        sha256: of their pixels.
        recorded: what `sample` recorded about them (engine, sampler, seeds); empty for images from elsewhere.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    parts: Parts
    sha256: str
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the images, `size` at a time whatever the parts are.

        The last digits of a network's features depend on the batch size, so it must not depend on how a set is stored.
        """
        pending: list[Tensor] = []
        for part in self.parts():
            pending.append(part)
            if sum(map(len, pending)) >= size:
                *full, last = torch.split(torch.cat(pending), size)
                full, pending = ([*full, last], []) if len(last) == size else (full, [last])
                yield from full
        if pending:
            yield torch.cat(pending)

    def take(self, count: int) -> "ImageSet":
        """Return the first `count` images; raise GaqError if there are fewer."""
        if count > self.count:
            raise GaqError(f"{self.name} has {self.count} images; expected at least {count}.")
        if count == self.count:
            return self

        def parts() -> Iterator[Tensor]:
            left = count
            for part in self.parts():
                if left > 0:
                    yield part[:left]
                left -= len(part)

        recorded = dict(self.recorded) | ({"num": count} if "num" in self.recorded else {})
        return replace(self, count=count, parts=parts, sha256=_digest(parts), recorded=recorded)


def open_images(path: Path, shape: tuple[int, int, int] | None = None) -> ImageSet:
    """Open a folder that `sample` wrote, a folder of PNGs, or an .npz.

    Args:
        path: the folder or file.
        shape: (C, H, W) that smaller images of an .npz are padded to, with black.

    Raises:
        GaqError: there are no images, they differ in size, or a part of them is missing.
    """
    if path.suffix == ".npz":
        return _of_array(path, shape)
    if (path / shards.RECORD).is_file() and "shard" in shards.read_fields(path):
        return _of_shards(path)
    return _of_pngs(path)


def _of_shards(path: Path) -> ImageSet:
    order = shards.read_order(path)

    def parts() -> Iterator[Tensor]:
        for images, _ in shards.read_shards(path):
            yield images

    first = next(parts())
    recorded = {**order.identity, "seed": order.seed, "num": order.num, "batch": order.batch}
    return ImageSet(
        name=str(path), count=order.num, shape=_shape(first), parts=parts, sha256=_digest(parts), recorded=recorded
    )


def _of_pngs(path: Path) -> ImageSet:
    recorded: dict[str, Any] = {}
    if (path / shards.RECORD).is_file():
        record = shards.read_fields(path)
        rows = check_record(_Pictures, record, path / shards.RECORD, _ADVICE, others=True).images
        if any(row.file is None for row in rows):
            raise GaqError(f"{path} holds arrays, which are no pictures: only images of 1 or 3 channels are evaluated.")
        files = [inside(path, str(row.file)) for row in rows]
        # How long it took changes no pixel, and the list of files is no setting.
        recorded = {key: value for key, value in record.items() if key not in ("images", "seconds")}
        recorded |= {"seed": rows[0].seed, "num": len(files)}
    elif shards.shard_path(path, 0).exists():  # the only picture beside them is their overview
        raise GaqError(
            f"{path} holds shards, and no {shards.RECORD} that says how many: the same `sample` command writes it."
        )
    else:
        files = sorted(path.glob("*.png"))
    if not files:
        raise GaqError(f"{path} holds no images: give a folder that `sample` wrote, a folder of PNGs, or an .npz.")

    shape = _shape(image_files.read_png(files[0])[None])

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(files), PART):
            yield _stacked([image_files.read_png(file) for file in files[start : start + PART]], shape, path)

    return ImageSet(
        name=str(path),
        count=len(files),
        shape=shape,
        parts=parts,
        sha256=_digest(parts),
        recorded=recorded,
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    seed: Seed
    file: str | None = None
    condition: str | None = None
    psnr_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """What `samples.json` says of pictures; whatever else it holds is what they depend on."""

    images: Annotated[tuple[_Row, ...], Field(min_length=1)]


def _of_array(path: Path, shape: tuple[int, int, int] | None) -> ImageSet:
    """Open the training images of a data set, because those are what a network learned to draw."""
    array = image_files.read_images(path, ("train_images", "images"))
    height, width, channels = array.shape[1:]
    if shape and (channels != shape[0] or height > shape[1] or width > shape[2]):
        raise GaqError(f"{path} has {array.dtype} images {array.shape[1:]}; expected uint8 images {shape} (C, H, W).")
    images = frechet.padded(array, *(shape[1:] if shape else (height, width)))

    def parts() -> Iterator[Tensor]:
        yield from torch.split(images, PART)

    return ImageSet(name=path.name, count=len(images), shape=_shape(images), parts=parts, sha256=_digest(parts))


def _stacked(images: list[Tensor], shape: tuple[int, int, int], path: Path) -> Tensor:
    shapes = {shape, *(tuple(image.shape) for image in images)}
    if len(shapes) > 1:
        raise GaqError(f"{path} holds images of different sizes: {sorted(shapes)[:3]} (C, H, W).")
    return torch.stack(images)


def _shape(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width


def _digest(parts: Parts) -> str:
    # The shape first, since the same bytes in another shape are other images.
    sha = hashlib.sha256(repr(_shape(next(parts()))).encode())
    for part in parts():
        sha.update(part.contiguous().numpy().tobytes())
    return sha.hexdigest()
