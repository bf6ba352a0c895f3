"""Kill commands at random moments, run them again, and compare: the same bytes in the end, and nothing left over.

    python benchmarks/kills.py --kills 50 --out docs/results/kills.md

Each trial starts one command in a copy of what it needs, kills its whole process group with SIGKILL after a random time
(perhaps twice), and then lets the same command finish. Its files must be those of a run that nobody disturbed; numbers
that are times, and records that hold them, are left out.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from calib.files import read_safetensors
from command import command_line, write_markdown
from fuzz_targets import make_material
from gaq_export.report.markdown import machine, markdown_table
from options import Out

TIMES = (
    *("seconds", "when", "phase_seconds", "collect_seconds", "build_seconds", "milliseconds"),
    *("peak_mib", "peak_memory_mib"),
)
UNLIKE = ("clock.json", ".html", ".md", ".svg", ".png")  # pages and clocks hold times


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, and the part of the material that it may find."""

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    writes: tuple[str, ...]


COMMANDS = (
    Command(
        name="calibrate",
        words=("calibrate", "--weights", "model", "--preset", "tiny", "--iterations", "60", "--run", "run"),
        needs=("model",),
        writes=("run",),
    ),
    Command(
        name="build-engine",
        words=("build-engine", "--run", "run", "--backend", "openvino", "--threads", "1", "--batch", "1,2,2"),
        needs=("model", "run"),
        writes=("unet.plan", "unet.plan.json"),
    ),
    Command(
        name="sample to shards",
        words=("sample", "--engine", "unet.plan", "--num", "600", "--shard", "20", "--out", "shards"),
        needs=("model", "run", "unet.plan", "unet.plan.json"),
        writes=("shards",),
    ),
    Command(
        name="compare",
        words=(
            *("compare", "--weights", "model", "--preset", "tiny", "--recipes", "rtn,adaround", "--images", "0"),
            *("--steps", "4", "--workers", "1", "--folder", "compared"),
        ),
        needs=("model",),
        writes=("compared",),
    ),
    Command(
        name="evaluate",
        words=("evaluate", "--engine", "unet.plan", "--num", "40", "--features", "digits", "--workers", "1"),
        needs=("model", "run", "unet.plan", "unet.plan.json"),
        writes=("evaluation",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How many times a command was killed, and what differed afterwards; "" if nothing did."""

    command: str
    kills: int
    difference: str


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many, over all commands.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Annotated[str, typer.Option(help="Part of a command's name; all by default.")] = "",
    out: Out = None,
) -> None:
    """Kill commands and print what was left different; exit code 1 if anything was."""
    random = Random(seed)
    commands = [command for command in COMMANDS if only in command.name]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as scratch:
        here, material = Path(scratch) / "here", Path(scratch) / "material"
        here.mkdir()
        before = Path.cwd()
        make_material(here, size=32)  # the digits' network takes no smaller images
        os.chdir(before)
        here.rename(material)  # every trial is at the place where the material was made: records hold the model's path
        for command in commands:
            _prepare(command, material, here)
            started = time.monotonic()
            _finish(command, here)
            seconds = time.monotonic() - started
            expected = _contents(command, here)
            done = 0
            while done < kills // len(commands):
                trials.append(_trial(command, material, here, seconds, random, expected))
                done += trials[-1].kills
                print(trials[-1], flush=True)
    write_markdown(_page(trials), out)
    raise SystemExit(1 if any(trial.difference for trial in trials) else 0)


def _prepare(command: Command, material: Path, here: Path) -> None:
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    for name in command.needs:
        source = material / name
        shutil.copytree(source, here / name) if source.is_dir() else shutil.copy(source, here / name)


def _trial(
    command: Command, material: Path, here: Path, seconds: float, random: Random, expected: Mapping[str, str]
) -> Trial:
    _prepare(command, material, here)
    killed = 0
    for _ in range(random.choice((1, 1, 2))):
        process = subprocess.Popen(_words(command), cwd=here, start_new_session=True, **_SILENT)
        # Not in the first part, where Python still reads its modules.
        time.sleep(seconds * random.uniform(0.3, 1.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    _finish(command, here)
    actual = _contents(command, here)
    differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    return Trial(command=command.name, kills=killed, difference=", ".join(differing))


_SILENT: Mapping[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _words(command: Command) -> list[str]:
    return [sys.executable, "-m", "gaq_export", *command.words, "-q"]


def _finish(command: Command, here: Path) -> None:
    done = subprocess.run(_words(command), cwd=here, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command.name} ends with exit code {done.returncode}: {done.stderr[-500:]}")


def _contents(command: Command, here: Path) -> dict[str, str]:
    """Return a hash of every file that the command wrote, and the names of all others, hidden ones included."""
    contents = {}
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        if path.is_file():
            mine = any(name == one or name.startswith(f"{one}/") for one in command.writes)
            contents[name] = _sha(path) if mine and not name.endswith(UNLIKE) else "there"
    return contents


def _sha(path: Path) -> str:
    if path.suffix == ".safetensors":
        header, tensors = read_safetensors(path)
        # The library writes the header's keys in any order.
        parts = [
            str(sorted(header.items())),
            *(f"{name} {t.dtype} {t.tolist()}" for name, t in sorted(tensors.items())),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(_without_times(json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without_times(value: Any) -> Any:
    """Return JSON values without those that are times, or hashes of records that hold some."""
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES and "sha256" not in key}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _page(trials: list[Trial]) -> list[str]:
    names = dict.fromkeys(trial.command for trial in trials)
    rows = []
    for name in names:
        own = [trial for trial in trials if trial.command == name]
        rows.append((name, str(len(own)), str(sum(t.kills for t in own)), str(sum(bool(t.difference) for t in own))))
    return [
        "# Killed commands",
        "",
        f"{sum(trial.kills for trial in trials)} kills by SIGKILL of the process group at random moments, {machine()}.",
        "",
        *markdown_table(["command", "runs", "kills", "runs that ended in other bytes or leftovers"], rows),
        "",
        f"    {command_line()}",
    ]


if __name__ == "__main__":
    typer.run(main)
