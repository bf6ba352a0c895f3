"""What a machine of a cluster does for one task: a process in a scratch folder, whose files go back as they appear.

In: the files that the task needs, and a pickled function. Out: updates with what it has written, the last one with its
result. The machines need not share a disk with the one that started the task.

This module is imported by Ray's worker, and so imports nothing large; the function is called in a process of its own,
which has one thread, whose peak memory is the task's alone, and whose crash costs one task.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 0.5  # seconds between looks for new files
_SHARED, _CALL, _RESULT, _FILES = "shared.pickle", "call.pickle", "result.pickle", "files"
_Stamps = dict[str, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a machine has to do.

    Attributes:
        call: pickled (function, arguments that follow the shared value and the folder).
        log: file of the folder that the function's output goes to.
        words: command line of the process that asked, for records.
        paths: where that process finds modules.
    """

    call: bytes
    log: str
    words: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a task has written since the update before.

    Attributes:
        files: content by path in the folder, in the order in which they were written.
        code: exit code of the process; None while it runs.
        result: what the function returned, pickled, if the process has ended well.
    """

    files: Mapping[str, bytes]
    code: int | None = None
    result: bytes = b""


def do(shared: bytes, files: Mapping[str, bytes], more: Mapping[str, bytes], request: Request) -> Iterator[Update]:
    """Call the requested function in a process and yield what it writes.

    Args:
        shared: pickled, the first argument of every task's function.
        files: content by path in the folder, of what several tasks need.
        more: the same, of this task alone.
        request: what to call.
    """
    with tempfile.TemporaryDirectory(prefix="gaq-export-") as name:
        scratch = Path(name)
        folder = scratch / _FILES
        for path, content in {**files, **more}.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        folder.mkdir(exist_ok=True)
        (scratch / _SHARED).write_bytes(shared)
        (scratch / _CALL).write_bytes(pickle.dumps((request.call, request.words)))
        yield from _run(scratch, request)


def _run(scratch: Path, request: Request) -> Iterator[Update]:
    folder = scratch / _FILES
    stamps = _stamps(folder)
    log = folder / request.log
    log.parent.mkdir(parents=True, exist_ok=True)
    # With one thread sums have one order, whatever the machine.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(request.paths)}
    command = [sys.executable, "-m", __name__, str(scratch)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=env)
    with process:  # its input stays open until it has ended
        try:
            while process.poll() is None:
                try:
                    process.wait(EVERY)
                except subprocess.TimeoutExpired:
                    if changed := _changed(folder, stamps):
                        yield Update(files=changed)
        finally:
            process.kill()  # this generator may be closed before the end
    result = scratch / _RESULT
    content = result.read_bytes() if process.returncode == 0 else b""
    yield Update(files=_changed(folder, stamps), code=process.returncode, result=content)


def _stamps(folder: Path) -> _Stamps:
    """Return what changes with each file's content, oldest first; names with a dot are files that are not whole."""
    found = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        if path.is_file():
            found[relative.as_posix()] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _changed(folder: Path, stamps: _Stamps) -> dict[str, bytes]:
    """Return the files that have changed since `stamps`, which is brought up to date."""
    changed = {}
    for path, stamp in _stamps(folder).items():
        if stamps.get(path) == stamp:
            continue
        try:
            changed[path] = (folder / path).read_bytes()
        except FileNotFoundError:
            continue
        stamps[path] = stamp
    return changed


def unpickled(content: bytes) -> Any:
    """Return the value that was pickled on another machine of the cluster."""
    return pickle.loads(content)  # noqa: S301 - Ray, which brings it, unpickles all that it brings


def main(scratch: Path) -> None:
    """Call the function of the task in a scratch folder; the process ends with Ray's worker, which has started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    call, words = unpickled((scratch / _CALL).read_bytes())
    sys.argv[:] = words
    shared = unpickled((scratch / _SHARED).read_bytes())
    function, arguments = unpickled(call)
    result = function(shared, scratch / _FILES, *arguments)
    (scratch / _RESULT).write_bytes(pickle.dumps(result))


def _end_with_parent() -> None:
    """End this process when the one that holds the other end of its input is killed."""
    os.read(0, 1)  # nothing is ever sent; not by `sys.stdin`, whose lock would be held when this process ends by itself
    os._exit(1)  # from a thread, `sys.exit` would end only the thread


if __name__ == "__main__":
    main(Path(sys.argv[1]))
