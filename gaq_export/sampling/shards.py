"""Images in shards: files of equally many images, with which a long run can stop, continue, and be divided.

    OUT/samples.json               the request: engine, sampler, seeds, images a shard
    OUT/shard-000000.safetensors   images (N, C, H, W) uint8, seeds (N,) int64

A shard is written whole or not at all. Which images are in it, and the arithmetic of each, depend on the request alone;
so a run that was killed and continued has the same bytes as one that was not.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from calib import records
from calib.errors import CalibError
from calib.files import read_kept, read_safetensors, write_atomically, write_checked
from calib.records import Count, Seed
from gaq_export.errors import GaqError

RECORD = "samples.json"
_ADVICE = "Give a folder that `sample` wrote, or another --out"
MOST = 1_000_000  # files in a folder


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which images to draw, and into which files.

    Attributes:
        num: images in all; image i has seed `seed + i`.
        seed: seed of the first image.
        shard: images in a file; the last file may have fewer.
        batch: images drawn at a time.
        identity: everything else that the images depend on, JSON values.
    """

    num: Annotated[int, Field(ge=1, le=1 << 50)]
    seed: Seed
    shard: Count
    batch: Count
    identity: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.num // self.shard)  # rounded up

    def seeds(self, index: int) -> tuple[int, ...]:
        """Return the seeds of one file's images."""
        first = index * self.shard
        end = min(first + self.shard, self.num)
        return tuple(range(self.seed + first, self.seed + end))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "num": self.num,
            "seed": self.seed,
            "shard": self.shard,
            "batch": self.batch,
            "identity": dict(self.identity),
        }


def claim(out: Path, order: Order) -> None:
    """Write the request down, or check that it is the one written there; raise GaqError if `out` holds other images."""
    path = out / RECORD
    record = json.loads(json.dumps(order.to_json()))  # tuples become lists, as they are in the record that was read
    if not path.exists():
        write_atomically(path, records.signed(record))
        return
    old = read_order(out).to_json()
    changed = [key for key in record if old[key] != record[key]]
    # More of the same images are welcome if the old ones fill their files: a shard, once written, never changes.
    if changed == ["num"] and old["num"] < order.num and old["num"] % order.shard == 0:
        write_atomically(path, records.signed(record))
    elif changed:
        raise GaqError(f"{out} holds other images ({changed[0]} differs). Give --out another folder, or delete it.")


def read_fields(folder: Path) -> dict[str, Any]:
    """Return what `sample` wrote down about a folder, shards or not; raise CalibError if that was edited or is gone."""
    return records.read_signed(dict[str, Any], folder / RECORD, _ADVICE)


def read_order(folder: Path) -> Order:
    """Return the request that a folder of shards was drawn for; raise CalibError or GaqError if it has none."""
    order = records.read_signed(Order, folder / RECORD, _ADVICE)
    if order.shards > MOST:
        raise GaqError(f"{folder / RECORD} speaks of {order.shards} files, and at most {MOST} are written. {_ADVICE}.")
    return order


def missing(out: Path, order: Order, shape: tuple[int, int, int]) -> list[int]:
    """Return the numbers of the shards that have yet to be drawn, or do not verify, which the log says.

    Args:
        out: the folder.
        order: the request.
        shape: (C, H, W) of an image.
    """
    # One look at the folder, since it may be far away and the files many.
    there = set(os.listdir(out))

    def whole(index: int) -> bool:
        path = shard_path(out, index)
        if path.name not in there:
            return False
        return read_kept(path, lambda header, tensors: _parse(path, order, index, shape, tensors)) is not None

    return [index for index in range(order.shards) if not whole(index)]


def write_shard(out: Path, order: Order, index: int, images: Tensor) -> None:
    """Write one shard, (N, C, H, W) uint8."""
    seeds = torch.tensor(order.seeds(index), dtype=torch.int64)
    write_checked(shard_path(out, index), {"images": images, "seeds": seeds})


def shard_path(out: Path, index: int) -> Path:
    """Return the path of a shard."""
    return out / f"shard-{index:06d}.safetensors"


def read_shards(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (N, C, H, W) uint8 and seeds (N,) of each shard in order.

    Raises:
        CalibError, GaqError: one is missing, damaged, or not what was requested.
    """
    order = read_order(folder)
    shape = None
    for index in range(order.shards):
        path = shard_path(folder, index)
        if not path.is_file():
            raise GaqError(f"{path} is missing: the same `sample` command draws what is left.")
        images, seeds = _parse(path, order, index, shape, read_safetensors(path, checked=True)[1])
        shape = tuple(images.shape[1:])
        yield images, seeds


def _parse(
    path: Path, order: Order, index: int, shape: tuple[int, ...] | None, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return images and seeds of a shard; raise CalibError if they are not those of the request."""
    images, seeds = tensors.get("images"), tensors.get("seeds")
    advice = "The same `sample` command draws it again"
    if images is None or images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
        found = "no images" if images is None else f"images of {images.dtype} {tuple(images.shape)}"
        raise CalibError(f"{path} holds {found}; expected uint8 (N, C, H, W). {advice}.")
    if shape is not None and images.shape[1:] != shape:
        raise CalibError(f"{path} holds images {tuple(images.shape[1:])}; expected {tuple(shape)} (C, H, W). {advice}.")
    expected = order.seeds(index)
    if seeds is None or len(images) != len(expected) or not torch.equal(seeds, torch.tensor(expected)):
        raise CalibError(
            f"{path} does not hold the {len(expected)} images of seeds {expected[0]} to {expected[-1]}. {advice}."
        )
    return images, seeds


def digest(folder: Path) -> str:
    """Return the sha256 of all images and seeds."""
    sha = hashlib.sha256()
    for images, seeds in read_shards(folder):
        # File by file, so the whole set never has to fit into memory.
        sha.update(images.numpy().tobytes() + seeds.numpy().tobytes())
    return sha.hexdigest()
