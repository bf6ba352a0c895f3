"""Recorded samples in memory, on a GPU or on disk, read a few at a time.

A recording of 5 120 inputs of one block of the CIFAR-10 U-Net takes 2.7 GB. Kept in a file and mapped only while some
of its rows are copied, it costs the process the memory of those rows, and the operating system caches the rest.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calib.choices import Cache
from calib.devices import HOST, free_bytes

FILE_BYTES = 64 << 20  # smaller recordings stay in memory
MEMORY_BUDGET, DISK_BUDGET = 1 << 30, 8 << 30  # bytes of finished blocks' outputs
DEVICE_SHARE = 0.25  # of what is free there; the rest is for the block at work


class FileSamples:
    """N samples of one shape in a file; reads like a tensor indexed along its first axis."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._path, self._shape, self._dtype = path, shape, dtype

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return a copy of the rows at `index` (M,) int64."""
        return self._map()[index]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self._map()[rows] = value

    def _map(self) -> Tensor:
        file = str(self._path)
        return torch.from_file(file, shared=True, size=math.prod(self._shape), dtype=self._dtype).reshape(self._shape)


Samples = Tensor | FileSamples


def rows_at(samples: Samples, index: Tensor, device: torch.device) -> Tensor:
    """Return the rows at `index` (M,), which lies on the host, in the memory of `device`."""
    if isinstance(samples, Tensor):
        index = index.to(samples.device)
    return samples[index].to(device)


@dataclass(frozen=True, kw_only=True)
class SampleStore:
    """Where recordings go. Their bits do not depend on it.

    Attributes:
        folder: for files; None keeps all in memory.
        cache: the place; by default the network's device while it has room to spare, else the host's memory, and a file
            for what is large.
        device: of the network.
    """

    folder: Path | None = None
    cache: Cache = Cache.AUTO
    device: torch.device = HOST

    def inside(self, name: str) -> "SampleStore":
        """Return the same store with files in a sub-folder."""
        return replace(self, folder=self.folder and self.folder / name)

    @property
    def budget(self) -> float:
        """Bytes of finished blocks' outputs that it is worth to keep, so that they need not be computed again."""
        if self._on_device(0):
            return free_bytes(self.device) * DEVICE_SHARE
        if self.folder is None or self.cache is Cache.HOST:
            return MEMORY_BUDGET
        self.folder.mkdir(parents=True, exist_ok=True)
        return min(DISK_BUDGET, shutil.disk_usage(self.folder).free // 4)

    def allocate(self, value: Tensor, total: int, name: str) -> Samples:
        """Return storage (total, ...) for samples like those in `value`.

        Args:
            value: (n, ...), any of the samples.
            total: N.
            name: of the file, if it is one.
        """
        shape = (total, *value.shape[1:])
        size = math.prod(shape) * value.element_size()
        if self._on_device(size):
            return torch.empty(shape, dtype=value.dtype, device=self.device)
        large = size > FILE_BYTES and self.cache is not Cache.HOST
        if self.folder is None or not (large or self.cache is Cache.DISK):
            # Pinned pages are what a GPU reads fastest.
            return torch.empty(shape, dtype=value.dtype, pin_memory=self.device.type == "cuda")
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileSamples(self.folder / name, shape, value.dtype)

    def _on_device(self, size: int) -> bool:
        """Whether so many bytes go to a device that is not the host."""
        if self.device == HOST or self.cache in (Cache.HOST, Cache.DISK):
            return False
        return self.cache is Cache.DEVICE or size <= free_bytes(self.device) * DEVICE_SHARE


IN_MEMORY = SampleStore()
