"""The error that `gaq_export` raises for anything a user can cause, and the errors that commands print in one line."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

_NO_MEMORY = re.compile("(?i)can't allocate memory|out of memory|cannot allocate|failed to allocate|bad_alloc")
_NO_GPU_MEMORY = re.compile("(?i)(?:cuda|mps)\\b.*out of memory")
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class GaqError(Exception):
    """An error that a user can act on: one line that says what was seen, what was expected and what to do."""


def unknown(what: str, name: object, choices: Iterable[str], hint: str = "") -> GaqError:
    """Return, not raise, the error for a name that is in no table.

    Args:
        what: kind of thing that is named, such as "model".
        name: what the user wrote.
        choices: the names that exist, in the order in which to list them.
        hint: another sentence for the end of the message.
    """
    choices = [str(choice) for choice in choices]  # members of an enumeration would be listed with their class
    sentences = [f"Unknown {what} {name!r}."]
    sentences += [f"Did you mean {near!r}?" for near in get_close_matches(str(name), choices, n=1)]
    sentences.append(f"Choose one of {choices}.")
    return GaqError(" ".join([*sentences, *filter(None, [hint])]))


def one_line(error: BaseException) -> str:
    """Return the message of a foreign error without line breaks, cut to 200 characters; its class if it has none."""
    return visible(str(error)).strip()[:200] or type(error).__name__


def visible(text: str) -> str:
    """Return a foreign text on one line, without characters that would hide, move or erase what stands around it.

    White space becomes one space each; control characters, marks that turn the direction of writing, and halves of
    characters (undecodable file names have them) become U+FFFD.
    """
    return _HIDDEN.sub("\ufffd", " ".join(re.split(r"\s+", text)))


def used_up(error: BaseException) -> str | None:
    """Return a sentence on the memory or disk that ran out, None if the error is about something else."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"No space left on the disk{where}: make room. The same command continues with what is finished."
    if isinstance(error, RuntimeError) and _NO_GPU_MEMORY.search(str(error)):
        return (
            f"Out of memory on the GPU ({one_line(error)[:100]}): give calibrate --cache host, or choose --device cpu, "
            "a smaller --batch or --preset. The same command continues with what is finished, on the same device."
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return (
            f"Out of memory ({one_line(error)[:100]}): close other programs, or choose fewer --workers, a smaller "
            "--batch or --preset. The same command continues with what is finished."
        )
    return None


def user_errors() -> tuple[type[Exception], ...]:
    """Return the error classes that a command prints in one line instead of a traceback.

    A function and not a constant: importing `engines` loads onnx, which `--help` must not wait for. Call it when a
    command has already failed.
    """
    from calib.errors import CalibError
    from engines.errors import EngineError

    return (GaqError, CalibError, EngineError)
