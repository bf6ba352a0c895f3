"""Folders that appear whole or not at all: written beside their place, then renamed into it.

In: where a result is to go. Out: a temporary folder to write it to, and the rename. A command that is interrupted
leaves the old result as it was.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gaq_export.errors import GaqError


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, from where a rename puts finished files in place, all or none.

    Raises:
        GaqError: the folder around `out` cannot be made or written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so on the same file system: a rename between two file systems fails.
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise GaqError(f"Cannot write to {out.parent}: {error.strerror}. Choose a folder you may write to.") from error
    with folder as name:
        yield Path(name)


def check_replaceable(out: Path, mark: str) -> None:
    """Raise GaqError if writing to `out` would replace something else than this command writes.

    Args:
        out: folder to write; it may be new or empty.
        mark: name of a file that is in every folder of this kind.
    """
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (out / mark).is_file() and not is_empty:
        raise GaqError(f"{out} is there and has no {mark}: choose a folder that is new, empty, or of this kind.")


def replace_folder(finished: Path, out: Path) -> None:
    """Put a finished folder in the place of `out`; it lies in a `staging` folder, which then holds the old one."""
    if out.exists():
        # A folder with files in it cannot be overwritten, so the old one moves away; `staging` deletes it at its end.
        os.replace(out, finished.with_name(f"{finished.name}.old"))
    os.replace(finished, out)
