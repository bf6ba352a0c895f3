"""Samples on disk, read a few at a time.

A recording of 5 120 inputs of one block of the CIFAR-10 U-Net takes 2.7 GB. Kept in a file and mapped only while some
of its rows are copied, it costs the process the memory of those rows, and the operating system caches the rest.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

FILE_BYTES = 64 << 20  # smaller recordings stay in memory


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


def allocate(value: Tensor, total: int, folder: Path | None, name: str) -> Samples:
    """Return storage (total, ...) for samples like those in `value`: in memory, or in `folder` if it is large.

    Args:
        value: (n, ...), any of the samples.
        total: N.
        folder: for files; None keeps all in memory.
        name: of the file.
    """
    shape = (total, *value.shape[1:])
    if folder is None or math.prod(shape) * value.element_size() <= FILE_BYTES:
        return torch.empty(shape, dtype=value.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return FileSamples(folder / name, shape, value.dtype)
