"""Reading safetensors with one clear error, and writing files that are either whole or absent."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calib.errors import CalibError


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors; raise CalibError where the file is not whole safetensors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CalibError(f"{path} is not a whole safetensors file ({error}): delete it and run again.") from error


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
