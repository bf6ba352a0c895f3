"""Reading safetensors with one clear error, and writing files that are either whole or absent."""

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CalibError(f"Cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error
