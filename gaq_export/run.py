"""The run folder: where a calibration keeps its files, and the journal of what was done in it."""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.files import write_atomically
from engines.machine import PACKAGES, versions
from gaq_export._version import __version__
from gaq_export.errors import GaqError

FORMAT = 1
DEFAULT = Path("gaq-run")


@dataclass(frozen=True, kw_only=True)
class Run:
    """File names inside one run folder."""

    folder: Path

    @property
    def record(self) -> Path:
        """Settings and journal."""
        return self.folder / "run.json"

    @property
    def plan(self) -> Path:
        """The result of calibration; plan.json is beside it."""
        return self.folder / "plan.safetensors"

    @property
    def calibration(self) -> Path:
        """Folder of collected trajectories."""
        return self.folder / "calibration"

    @property
    def blocks(self) -> Path:
        """Folder of finished blocks."""
        return self.folder / "blocks"

    @property
    def times(self) -> Path:
        """How long a step takes at each width, if a budget asked for it."""
        return self.folder / "times.json"

    @property
    def page(self) -> Path:
        """What `inspect` writes."""
        return self.folder / "inspect.html"

    @property
    def report(self) -> Path:
        """What `report` writes."""
        return self.folder / "report.html"

    def onnx(self, profile: str, graph: str) -> Path:
        """The QDQ graph of one profile."""
        return self.folder / f"unet.{graph}.{profile}.onnx"


def begin(run: Run, settings: Mapping[str, Any]) -> None:
    """Claim the folder for `settings`, or continue a run that has the same.

    Raises:
        GaqError: the folder holds a run with other settings, or its record cannot be read.
        CalibError: the folder cannot be written.
    """
    record = _read(run)
    if record is None:
        _write(run, {"format": FORMAT, "settings": dict(settings), "journal": []})
        return
    old = record["settings"]
    changed = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
    if changed:
        k = changed[0]
        raise GaqError(
            f"{run.folder} holds a run with other settings ({k}: {_short(old.get(k))}, now {_short(settings.get(k))}). "
            "Give --run another folder, or delete this one."
        )


def note(run: Run, step: str, **facts: Any) -> None:
    """Add one line to the journal: what was done, when, by which command, with which versions, and `facts`."""
    record = _read(run) or {"format": FORMAT, "settings": {}, "journal": []}
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record["journal"].append({"step": step, "when": when, **made_with(), **facts})
    _write(run, record)


def made_with() -> dict[str, Any]:
    """Return the command that this process is (None if it is another program), and the versions at work."""
    program = Path(sys.argv[0])
    ours = program.stem == "gaq-export" or program.parts[-2:] == ("gaq_export", "__main__.py")
    return {
        "command": shlex.join(["gaq-export", *sys.argv[1:]]) if ours else None,
        "version": __version__,
        "packages": {name: number for name, number in versions(PACKAGES).items() if number},
    }


def peak_memory_mib() -> int | None:
    """Return the most memory that this process has held, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def recall(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that calibration was given, and the journal.

    Raises:
        GaqError: there is no record, or it cannot be read.
    """
    record = _read(run)
    if record is None or "images" not in record["settings"]:
        raise GaqError(f"No record of a calibration in {run.folder}: run `gaq-export calibrate` first.")
    return record["settings"], record["journal"]


def last(journal: Sequence[Mapping[str, Any]], step: str) -> dict[str, Any]:
    """Return the last line of the journal about a step, empty if it has none."""
    return dict(next((line for line in reversed(journal) if line["step"] == step), {}))


def _read(run: Run) -> dict[str, Any] | None:
    if not run.record.exists():
        return None
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GaqError(f"Cannot read {run.record} ({error}). Give --run another folder, or delete this one.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise GaqError(f"{run.record} is not a run record of format {FORMAT}. Give --run another folder.")
    return record


def _write(run: Run, record: Mapping[str, Any]) -> None:
    write_atomically(run.record, json.dumps(record, indent=1).encode())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, so that a rename puts the finished files in place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise GaqError(f"Cannot write to {out.parent}: {error.strerror}. Choose a folder you may write to.") from error
    with folder as name:
        yield Path(name)


def check_replaceable(out: Path, mark: str) -> None:
    """Raise GaqError if `out` is there and is neither an empty folder nor one of the kind that has a file `mark`."""
    if out.exists() and not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise GaqError(f"{out} is there and has no {mark}: choose a folder that is new, empty, or of this kind.")


def replace_folder(made: Path, out: Path) -> None:
    """Put a finished folder, inside a `staging` folder, in the place of `out`."""
    if out.exists():
        os.replace(out, made.with_name(f"{made.name}.old"))
    os.replace(made, out)
