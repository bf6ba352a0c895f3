"""Samples in a file: they read like the tensor that was written, and small ones stay in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib import sample_store
from calib.sample_store import FileSamples, SampleStore


def test_large_recordings_go_to_a_file_and_read_like_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sample_store, "FILE_BYTES", 7 * 3 * 2 * 4 - 1)
    stored = SampleStore(folder=tmp_path / "new").allocate(values[:2], 7, "output")
    assert isinstance(stored, FileSamples)
    stored[0:4] = values[:4]
    stored[4:7] = values[4:]
    index = torch.tensor([6, 0, 6])
    assert torch.equal(stored[index], values[index])
    assert len(stored) == 7
    assert (tmp_path / "new" / "output").stat().st_size == 7 * 3 * 2 * 4


def test_a_copy_does_not_change_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_store, "FILE_BYTES", 0)
    stored = SampleStore(folder=tmp_path).allocate(torch.zeros(1, 2), 3, "output")
    stored[0:3] = torch.ones(3, 2)
    stored[torch.tensor([0])].zero_()
    assert torch.equal(stored[torch.arange(3)], torch.ones(3, 2))


@pytest.mark.parametrize("folder", [True, False])
def test_small_recordings_stay_in_memory(folder: bool, tmp_path: Path) -> None:
    store = SampleStore(folder=tmp_path / "new" if folder else None)
    stored = store.allocate(torch.zeros(2, 5, dtype=torch.int64), 4, "output")
    assert isinstance(stored, Tensor)
    assert (stored.shape, stored.dtype) == ((4, 5), torch.int64)
    assert not (tmp_path / "new").exists()
