"""What the command lines of the benchmarks share: errors in one line, the command as text, and writing the page."""

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.files import write_atomically
from gaq_export.errors import user_errors


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2."""
    try:
        yield
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def command_line() -> str:
    """Return the command of this process, as the page gives it: without the folders of files from elsewhere."""
    words = [word for word in sys.argv[1:] if word != "--report-only"]
    split = [word.rpartition("=") for word in words]
    short = [head + sep + (Path(tail).name if Path(tail).is_absolute() else tail) for head, sep, tail in split]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *short])


def write_markdown(lines: Iterable[str], out: Path | None) -> None:
    """Write a page to `out`, or print it if that is None."""
    text = "\n".join(lines)
    if out is None:
        print(text)
    else:
        write_atomically(out, f"{text}\n".encode())
