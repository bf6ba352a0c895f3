"""What a killed process left is cleared by a later one; what a living one is writing stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calib import leftovers
from calib.files import write_atomically
from calib.leftovers import temporary_name

ROOT = Path(__file__).resolve().parent.parent.parent
WRITE = """
import sys, tempfile, time
from pathlib import Path
from calib.leftovers import temporary_name
folder = Path(sys.argv[1])
(folder / temporary_name(folder, "plan.json")).write_text("half")
tempfile.mkdtemp(dir=folder, prefix=temporary_name(folder, "unet.plan") + ".")
print("written", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


def test_both_packages_name_their_files_alike() -> None:
    ours, theirs = ((ROOT / package / "leftovers.py").read_text() for package in ("calib", "engines"))
    assert ours.replace("`engines.leftovers`", "`calib.leftovers`") == theirs


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    leftovers._clear.cache_clear()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".plan.json.0badcafe-1-1").touch()  # of another machine
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert len(list(tmp_path.iterdir())) == 6
        write_atomically(tmp_path / "new", b"")
        left = {path.name for path in tmp_path.iterdir()}
        assert len(left) == 5
        assert {"new", ".hidden", ".plan.json.0badcafe-1-1"} < left
        assert sum(f"-{writers[1].pid}-" in name for name in left) == 2
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_the_number_of_a_process_that_is_used_again_does_not_count(tmp_path: Path) -> None:
    leftovers._clear.cache_clear()
    name = temporary_name(tmp_path, "plan.json")
    (tmp_path / name).touch()
    head, _, start = name.rpartition("-")
    (tmp_path / f"{head}-{int(start) - 1}").touch()  # of an earlier process with our number
    leftovers._clear.cache_clear()
    temporary_name(tmp_path, "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert f"-{os.getpid()}-" in name
