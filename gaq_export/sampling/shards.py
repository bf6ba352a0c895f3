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
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from calib.files import read_safetensors, write_atomically
from gaq_export.errors import GaqError

RECORD = "samples.json"
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

    num: int
    seed: int
    shard: int
    batch: int
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
        write_atomically(path, json.dumps(record, indent=1).encode())
        return
    old = read_record(out)
    changed = [key for key in record if old.get(key) != record[key]]
    # More of the same images are welcome if the old ones fill their files: a shard, once written, never changes.
    if changed == ["num"] and old["num"] < order.num and old["num"] % order.shard == 0:
        write_atomically(path, json.dumps(record, indent=1).encode())
    elif changed:
        raise GaqError(f"{out} holds other images ({changed[0]} differs). Give --out another folder, or delete it.")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the request that a folder was drawn for; raise GaqError if it has no such record."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GaqError(
            f"{folder / RECORD} cannot be read ({error}): this folder was not written by `sample`."
        ) from error
    return record


def missing(out: Path, order: Order) -> list[int]:
    """Return the numbers of the shards that have yet to be drawn."""
    # A file that exists is complete, because shards are written to another name and renamed.
    # One look at the folder, since it may be far away and the files many.
    there = set(os.listdir(out))
    return [index for index in range(order.shards) if shard_path(out, index).name not in there]


def write_shard(out: Path, order: Order, index: int, images: Tensor) -> None:
    """Write one shard, (N, C, H, W) uint8."""
    seeds = torch.tensor(order.seeds(index), dtype=torch.int64)
    write_atomically(shard_path(out, index), save({"images": images.contiguous(), "seeds": seeds}))


def shard_path(out: Path, index: int) -> Path:
    """Return the path of a shard."""
    return out / f"shard-{index:06d}.safetensors"


def read_shards(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (N, C, H, W) uint8 and seeds (N,) of each shard in order; raise GaqError if one is missing."""
    record = read_record(folder)
    for index in range(-(-record["num"] // record["shard"])):
        path = shard_path(folder, index)
        if not path.is_file():
            raise GaqError(f"{path} is missing: the same `sample` command draws what is left.")
        yield _read_shard(path)


def _read_shard(path: Path) -> tuple[Tensor, Tensor]:
    tensors = read_safetensors(path)[1]
    images, seeds = tensors.get("images"), tensors.get("seeds")
    if images is None or images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
        found = "no images" if images is None else f"images of {images.dtype} {tuple(images.shape)}"
        raise GaqError(f"{path} holds {found}; expected uint8 (N, C, H, W). Delete it, and run `sample` again.")
    if seeds is None or seeds.dtype != torch.int64 or seeds.shape != images.shape[:1]:
        raise GaqError(f"{path} does not hold the seed of each image. Delete it, and run `sample` again.")
    return images, seeds


def digest(folder: Path) -> str:
    """Return the sha256 of all images and seeds."""
    sha = hashlib.sha256()
    for images, seeds in read_shards(folder):
        # File by file, so the whole set never has to fit into memory.
        sha.update(images.numpy().tobytes() + seeds.numpy().tobytes())
    return sha.hexdigest()
