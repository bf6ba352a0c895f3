"""Names of temporary files that tell which process owns them, so that a later one clears what a killed one left.

    .NAME.MACHINE-PID-START[.RANDOM]

A process is known by its number and the time it started at, since numbers are used again; and by its machine, since a
folder may be shared by several. Where the system does not tell (it has no /proc), nothing is ever cleared.
`engines.leftovers` is the same for that package.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
from functools import cache
from pathlib import Path

_OWNED = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>[1-9][0-9]*)-(?P<start>[0-9]+)(\.[^.]+)?", re.DOTALL)


def temporary_name(folder: Path, name: str) -> str:
    """Return a name for what becomes `name` in a folder when it is whole; clear what killed processes left there.

    Args:
        folder: where it is written; looked through once for each process, because it may be large.
        name: of the finished file or folder.
    """
    _clear(folder)
    return f".{name}.{_machine()}-{os.getpid()}-{_started(os.getpid())}"


@cache
def _clear(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that is not there, or that others own
        for path in folder.iterdir():
            found = _OWNED.fullmatch(path.name)
            if found is None or found["machine"] != _machine() or _started(int(found["pid"])) in (found["start"], "0"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Return eight letters for the machine, or the container, whose process numbers these are."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        facts = f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
        return hashlib.sha256(facts.encode()).hexdigest()[:8]
    return "0" * 8


def _started(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if there is none, "0" if nobody knows."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "" if Path("/proc/self/stat").exists() else "0"
    except OSError:
        return "0"
    return status.rpartition(")")[2].split()[19]  # the name in parentheses may hold anything
