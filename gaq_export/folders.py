"""Folders that appear whole or not at all: written beside their place, then renamed into it; names that stay in one.

In: where a result is to go. Out: a temporary folder to write it to, and the rename. A command that is interrupted
leaves the old result as it was, and no result may take the place of what a command reads (`check_outputs`).
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.leftovers import temporary_name
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
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{temporary_name(out.parent, out.name)}.")
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


def check_outputs(files: Iterable[Path], taken: Iterable[Path]) -> None:
    """Raise GaqError if a file to be written cannot be one, or if writing it would destroy something that is needed.

    Args:
        files: all that a command is about to write, companions included.
        taken: files that it reads or that belong to the run, and folders in which it must not write at all. They are
            found under other names too: through links, `..` or a second hard link.
    """
    taken = list(taken)
    for file in files:
        check_name(file)
        for other in taken:
            # Not `Path.resolve`, which raises where links lead in a circle.
            if _same(file, other) or Path(os.path.realpath(file)).is_relative_to(os.path.realpath(other)):
                raise GaqError(f"Writing {file} would overwrite {other}, which is still needed: choose another name.")


def check_name(file: Path) -> None:
    """Raise GaqError if a path cannot be that of a file to write: a folder, a device, a pipe, a name that is too long.

    A file is written under another name and then renamed, which would put it in the place of a device.
    """
    try:
        exists = file.exists()
        if file.is_dir():
            raise GaqError(f"{file} is a folder; give the name of a file, such as {file / 'new'}.")
    except OSError as error:
        raise GaqError(f"Cannot write {file}: {error.strerror}. Choose another name.") from error
    if exists and not file.is_file():
        raise GaqError(f"{file} is a device or a pipe; give the name of a file.")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a record or an index in `folder` names.

    Whoever made the record chose the name, so it must not reach other files of this machine.

    Raises:
        GaqError: the name is absolute, or leads out of the folder by `..` or by a link.
    """
    path = folder / name
    try:
        # Links are followed in both: the folder itself may be reached through one.
        places = [folder.resolve(), *_hub_files(folder.resolve())]
        stays = not Path(name).is_absolute() and any(path.resolve().is_relative_to(place) for place in places)
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links that lead in a circle
        stays = False
    if not name or not stays:
        raise GaqError(
            f"The name {name[:100]!r} in a record of {folder} leads out of that folder; only files inside it are read. "
            "Copy the file into the folder, and name it there."
        )
    return path


def _hub_files(folder: Path) -> list[Path]:
    """Return where the files are that a snapshot in the Hugging Face client's cache is made of; its own are links."""
    return [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
