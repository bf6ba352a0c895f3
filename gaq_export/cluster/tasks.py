"""Have functions called on a cluster, each in a folder of this machine; what they write comes back as they write it.

A task whose machine is lost is done again elsewhere, and finds there what it had written by then.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.files import write_atomically
from gaq_export.cluster import task as remote
from gaq_export.cluster.connection import Cluster
from gaq_export.cluster.task import Request, Update

LOSSES = 3  # of a task's machines with no new file in between, before the task has failed


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A call on a machine of the cluster.

    Attributes:
        name: for the user.
        function: called as (shared value, folder, *arguments) in a process of its own.
        arguments: see there.
        folder: here; the task sees a folder with some of its files, and what it writes comes here.
        files: paths of files and folders in it that this task needs, if they are there.
        log: path in it that the output of the process goes to.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    folder: Path
    files: Sequence[str] = ()
    log: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """How a task has ended.

    Attributes:
        task: the task.
        failed: whether its process, or each machine that it was given to, died.
        result: what its function returned.
    """

    task: Task
    failed: bool
    result: Any = None


@dataclass(kw_only=True)
class _Attempt:
    """A task under way.

    Attributes:
        task: the task.
        losses: of machines since it last wrote a file.
        last: the update that came last.
    """

    task: Task
    losses: int = 0
    last: Update | None = None


class Tasks:
    """Calls functions that have their first argument in common.

    Args:
        cluster: where they run.
        gpu: whether each takes a GPU; else it takes a core.
        shared: what every function is given first.
    """

    def __init__(self, cluster: Cluster, *, gpu: bool, shared: object) -> None:
        self._ray = cluster.ray
        errors = self._ray.exceptions
        self._lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError)
        # Not tried again by Ray, which would begin with the files of the first attempt's start.
        options = {"num_cpus": 1, "num_gpus": int(gpu), "max_retries": 0, "num_returns": "streaming"}
        self._do = self._ray.remote(**options)(remote.do)
        # Once in Ray's store, and not once a task: a network may have gigabytes.
        self._shared = self._ray.put(self._pickled(shared))

    def run(self, tasks: Sequence[Task], folder: Path = Path(), files: Sequence[str] = ()) -> Iterator[Done]:
        """Yield how each task has ended, in the order in which they do.

        Args:
            tasks: what to do; the cluster decides when and where.
            folder: of files that all of them need.
            files: paths of files and folders in it.
        """
        common = self._ray.put(_contents(folder, files))
        running = {self._start(task, common): _Attempt(task=task) for task in tasks}
        while running:
            (stream, *_), _ = self._ray.wait(list(running), num_returns=1)
            attempt = running[stream]
            try:
                update: Update = self._ray.get(next(stream))
            except StopIteration:
                del running[stream]
                yield _ended(attempt)
            except self._lost:
                del running[stream]
                attempt.losses += 1
                if attempt.losses < LOSSES:
                    running[self._start(attempt.task, common)] = attempt
                else:
                    yield Done(task=attempt.task, failed=True)
            else:
                for path, content in update.files.items():
                    write_atomically(attempt.task.folder / path, content)
                attempt.losses = 0 if update.files else attempt.losses
                attempt.last = update

    def _start(self, task: Task, common: object) -> Any:
        """Give a task to the cluster, with what it has written so far, and return the stream of its updates."""
        request = Request(
            call=self._pickled((task.function, task.arguments)),
            log=task.log,
            words=tuple(sys.argv),
            paths=tuple(path for path in sys.path if path),
        )
        return self._do.remote(self._shared, common, _contents(task.folder, task.files), request)

    def _pickled(self, value: object) -> bytes:
        content: bytes = self._ray.cloudpickle.dumps(value)  # functions of a script or a notebook go by value
        return content


def _contents(folder: Path, files: Sequence[str]) -> dict[str, bytes]:
    """Return what lies at some paths in a folder, by path; temporary files, whose names begin with a dot, do not."""
    found = {}
    for file in files:
        place = folder / file
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                found[relative.as_posix()] = path.read_bytes()
    return found


def _ended(attempt: _Attempt) -> Done:
    update = attempt.last
    if update is None or update.code != 0:
        return Done(task=attempt.task, failed=True)
    return Done(task=attempt.task, failed=False, result=remote.unpickled(update.result))
