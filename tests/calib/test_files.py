"""Files that are whole or absent, and one clear error where they are neither."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from calib.errors import CalibError
from calib.files import read_safetensors, write_atomically, write_checked, write_safetensors


def test_what_is_written_is_read_back_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    write_safetensors(path, {"x": torch.arange(3)}, {"key": "value"})
    header, tensors = read_safetensors(path)
    assert header == {"key": "value"}
    assert torch.equal(tensors["x"], torch.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.arange(30)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibError, match=r"a\.safetensors is not a whole safetensors file .*: delete it and run again"):
        read_safetensors(path)


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CalibError, match=r"Cannot write .*a\.json: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_checksum_covers_names_types_shapes_bytes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors, header = {"a": torch.arange(4, dtype=torch.int32).reshape(2, 2)}, {"key": "k"}
    write_checked(path, tensors, header)
    assert read_safetensors(path, checked=True)[0] == header
    others = [
        ({"b": tensors["a"]}, header),
        ({"a": tensors["a"].view(torch.float32)}, header),
        ({"a": tensors["a"].flatten()}, header),
        ({"a": tensors["a"] + 1}, header),
        (tensors, {"key": "l"}),
    ]
    with safe_open(path, framework="pt") as file:
        checksum = {"sha256": file.metadata()["sha256"]}
    for changed, metadata in others:
        write_safetensors(path, changed, metadata | checksum)
        with pytest.raises(CalibError, match=r"was altered since it was written \(its checksum differs\)"):
            read_safetensors(path)
    write_safetensors(path, tensors, header)
    assert torch.equal(read_safetensors(path)[1]["a"], tensors["a"])  # a foreign file has none
    with pytest.raises(CalibError, match="its checksum differs"):
        read_safetensors(path, checked=True)
