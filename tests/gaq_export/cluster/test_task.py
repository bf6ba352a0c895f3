"""A task runs in a process of its own, in a folder whose files come back, and does not outlive its worker."""

import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gaq_export.cluster import task
from gaq_export.cluster.task import Request, Update

JOBS = """
import os, sys, time

def write(shared, folder, name):
    print(shared, *sys.argv)
    (folder / ".temporary").write_text("not whole")
    (folder / "a" / "there").write_text("changed")
    (folder / "b").mkdir()
    (folder / "b" / name).write_text(os.environ["OMP_NUM_THREADS"])
    return sorted(path.name for path in folder.iterdir())

def fail(shared, folder):
    (folder / "before").write_text("it failed")
    raise ValueError(shared)

def linger(shared, folder):
    (folder / "number").write_text(str(os.getpid()))
    time.sleep(60)
"""
Ask = Callable[..., Request]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "cluster_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("cluster_jobs")


def request(function: Callable[..., object], *arguments: object) -> Request:
    call = pickle.dumps((function, arguments))
    return Request(call=call, log="logs/task.log", words=("gaq-export", "compare"), paths=tuple(sys.path))


def updates(wanted: Request) -> list[Update]:
    return list(task.do(pickle.dumps("shared"), {"a/there": b"old", "a/same": b"same"}, {"own": b"own"}, wanted))


def test_what_a_task_writes_comes_back_and_nothing_else(jobs: ModuleType) -> None:
    *early, last = updates(request(jobs.write, "new"))
    files = {path: content for update in (*early, last) for path, content in update.files.items()}
    assert files == {"a/there": b"changed", "b/new": b"1", "logs/task.log": b"shared gaq-export compare\n"}
    assert (last.code, task.unpickled(last.result)) == (0, [".temporary", "a", "b", "logs", "own"])


def test_a_task_that_fails_sends_what_it_wrote_and_its_log(jobs: ModuleType) -> None:
    last = updates(request(jobs.fail))[-1]
    assert (last.code, last.result) == (1, b"")
    assert last.files["before"] == b"it failed"
    assert b"ValueError: shared" in last.files["logs/task.log"]


def test_a_task_ends_when_its_updates_are_not_wanted_any_more(jobs: ModuleType) -> None:
    running = task.do(pickle.dumps("shared"), {}, {}, request(jobs.linger))
    number = next(update.files["number"] for update in running if "number" in update.files)
    assert Path("/proc", number.decode()).exists()
    running.close()
    assert not Path("/proc", number.decode()).exists()


def test_a_task_ends_with_the_process_that_started_it(jobs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "shared.pickle").write_bytes(pickle.dumps(None))
    (tmp_path / "call.pickle").write_bytes(pickle.dumps((request(jobs.linger).call, ())))
    (tmp_path / "files").mkdir()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", task.__name__, tmp_path], stdin=subprocess.PIPE, env=env)
    while not (tmp_path / "files" / "number").exists():
        time.sleep(0.01)
    process.communicate()  # closes the pipe, as the system does for a process that is killed
    assert process.returncode == 1
