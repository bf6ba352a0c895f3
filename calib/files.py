"""Reading safetensors with one clear error, and writing files that are either whole or absent.

What a command keeps for a later one is written with a checksum (`write_checked`), and made again where it does not
verify (`read_kept`).
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calib.errors import CalibError
from calib.leftovers import temporary_name

CHECKSUM = "sha256"  # its key in the header of a file
_Kept = TypeVar("_Kept")
_log = logging.getLogger(__name__)


def read_safetensors(path: Path, *, checked: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors; raise CalibError if the file is not whole safetensors, or its checksum differs.

    Args:
        path: of the file.
        checked: whether it must have a checksum, as `write_checked` writes it; a foreign file has none.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CalibError(f"{path} is not a whole safetensors file ({error}): delete it and run again.") from error
    checksum = header.pop(CHECKSUM, "" if checked else None)
    if checksum is not None and checksum != _checksum(tensors, header):
        raise CalibError(f"{path} was altered since it was written (its checksum differs): delete it and run again.")
    return header, tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of names and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write_checked(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] = {}) -> None:
    """Write as `write_safetensors` does, with a checksum over everything; tensors need not be contiguous."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, tensors, {**header, CHECKSUM: _checksum(tensors, header)})


def read_kept(path: Path, parse: Callable[[dict[str, str], dict[str, Tensor]], _Kept | None]) -> _Kept | None:
    """Return what an earlier command kept in a file of `write_checked`, or None where it has to be made again.

    Args:
        path: of the file, which may be missing.
        parse: makes the result of header and tensors; returns None if they belong to something else, and raises
            CalibError if they are not what they should be. The latter is said in the log, as is a wrong checksum.
    """
    if not path.is_file():
        return None
    try:
        return parse(*read_safetensors(path, checked=True))
    except CalibError:
        _log.warning("%s is damaged, altered or of another version: it is made again.", path)
        return None


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    # Types and shapes too: the same bytes under another type are other numbers.
    layout = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(f"{tensors_digest(tensors)}{layout}{sorted(header.items())}".encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename.

    Raises:
        CalibError: the folder cannot be written.
    """
    _write(path, lambda temporary: temporary.write_bytes(content))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and metadata as `write_atomically` does, without a copy of them in memory.

    Args:
        path: of the file.
        tensors: contiguous, by name.
        header: metadata.

    Raises:
        CalibError: the folder cannot be written.
    """
    _write(path, lambda temporary: save_file(dict(tensors), temporary, dict(header)))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(temporary_name(path.parent, path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # here an error says what is wrong
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors would let nobody else read it
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) else error
        raise CalibError(f"Cannot write {path}: {reason}. Choose a folder you may write to.") from error
