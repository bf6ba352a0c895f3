"""The run folder: the files of a calibration, and a record of its settings and of what was done with it.

The record, `run.json`, is what lets the same command continue a calibration and refuse to mix two: it holds the
settings that the files depend on, and a journal with an entry for each command that has finished.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat

from calib import records as calib_records
from calib.files import write_atomically
from calib.records import Text
from engines.files import files_of
from engines.machine import PACKAGES, versions
from gaq_export._version import __version__
from gaq_export.errors import GaqError

FORMAT = 1
_ADVICE = "Give --run another folder, or delete this one"
DEFAULT = Path("gaq-run")


@dataclass(frozen=True, kw_only=True)
class Run:
    """File names inside one run folder."""

    folder: Path

    @property
    def record(self) -> Path:
        """Settings and journal, a `RunRecord`."""
        return self.folder / "run.json"

    @property
    def plan(self) -> Path:
        """The plan, the result of calibration; plan.json is beside it."""
        return self.folder / "plan.safetensors"

    @property
    def calibration(self) -> Path:
        """Folder of the trajectories that were collected for calibration."""
        return self.folder / "calibration"

    @property
    def blocks(self) -> Path:
        """Folder of the results of finished blocks."""
        return self.folder / "blocks"

    @property
    def times(self) -> Path:
        """How long a sampling step takes with weights of each width; measured for budgets in milliseconds."""
        return self.folder / "times.json"

    @property
    def verdict(self) -> Path:
        """How far the plan is from the float network; measured once."""
        return self.folder / "verdict.json"

    @property
    def inspection(self) -> Path:
        """The page that `inspect` writes."""
        return self.folder / "inspect.html"

    @property
    def report(self) -> Path:
        """The page that `report` writes."""
        return self.folder / "report.html"

    def onnx(self, profile: str, graph: str) -> Path:
        """The Q/DQ graph of a kind, for a profile."""
        return self.folder / f"unet.{graph}.{profile}.onnx"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        settings: what the files in the folder depend on, as JSON values.
        journal: an entry for each command that finished, oldest first: its step, when, the command line, the versions
            of packages, and what else was recorded.
    """

    settings: dict[str, Any]
    journal: list[dict[str, Any]]

    def last(self, step: str) -> dict[str, Any]:
        """Return the newest entry of the journal about a step, such as "calibrate"; empty if there is none."""
        return next((entry for entry in reversed(self.journal) if entry["step"] == step), {})


def claim(run: Run, settings: Mapping[str, Any]) -> None:
    """Write the settings to a new folder, or make sure that a run with the same settings is continued.

    Raises:
        GaqError: the folder holds a run with other settings or of another kind of device, or its record cannot be
            read.
        CalibError: the folder cannot be written.
    """
    record = _read(run)
    if record is None:
        _write(run, RunRecord(settings=dict(settings), journal=[]))
        return
    old = record.settings
    # Keys of both: a setting that only one version of this tool knows differs too.
    differing = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
    if differing == ["device"]:
        began = old.get("device", "cpu")
        # "cuda with TF32" is two options.
        options = f"--device {began}".replace(" with TF32", " --tf32")
        without = " without --tf32" if began == "cuda" and "device" in settings else ""
        raise GaqError(
            f"{run.folder} holds a run that began on {began}, now {settings.get('device', 'cpu')}: give "
            f"{options}{without}, or another --run."
        )
    if differing:
        key = differing[0]
        raise GaqError(
            f"{run.folder} holds a run with other settings ({key}: {_shortened(old.get(key))}, now "
            f"{_shortened(settings.get(key))}). Give --run another folder, or delete this one."
        )


def add_entry(run: Run, step: str, **facts: Any) -> None:
    """Add an entry to the journal.

    Args:
        run: the run folder.
        step: what was done, such as "calibrate".
        facts: whatever else is worth recording, as JSON values.

    Raises:
        GaqError: the record cannot be read.
        CalibError: the folder cannot be written.
    """
    record = _read(run) or RunRecord(settings={}, journal=[])
    # With its offset from UTC, since a run folder may move between machines.
    entry = {"step": step, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **command_and_versions(), **facts}
    _write(run, RunRecord(settings=record.settings, journal=[*record.journal, entry]))


def files_of_calibration(run: Run) -> list[Path]:
    """Return the files and folders that a calibration consists of, from its settings to its plan."""
    records = (run.record, run.plan, run.plan.with_suffix(".json"), run.times, run.verdict)
    return [*records, run.calibration, run.blocks, *run.folder.glob("conditioning-*.safetensors")]


def files_of_engines(run: Run) -> list[Path]:
    """Return the files of all engines that the journal names; raise GaqError if it cannot be read."""
    record = _read(run)
    paths = [entry.get("engine") for entry in record.journal] if record else []
    return [file for path in paths if path for file in files_of(run.folder / path)]


def command_and_versions() -> dict[str, Any]:
    """Return the command line of this process, None if it is another program's, and the versions of our packages."""
    program = Path(sys.argv[0])
    # Of another program, a notebook or a test, the arguments could hold anything and repeat nothing.
    is_ours = program.stem == "gaq-export" or program.parts[-2:] == ("gaq_export", "__main__.py")
    return {
        "command": shlex.join(["gaq-export", *sys.argv[1:]]) if is_ours else None,
        "version": __version__,
        "packages": {name: number for name, number in versions(PACKAGES).items() if number},
    }


def peak_memory_mib() -> int | None:
    """Return the most memory that this process has held, in MiB; None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)  # macOS counts bytes, Linux KiB


def read_record(run: Run) -> RunRecord:
    """Return the record of a run folder in which a calibration was started.

    Raises:
        GaqError: no calibration was started there, or its record cannot be read.
    """
    record = _read(run)
    if record is None or "images" not in record.settings:  # `add_entry` alone leaves no settings
        raise GaqError(f"No record of a calibration in {run.folder}: run `gaq-export calibrate` first.")
    return record


def _read(run: Run) -> RunRecord | None:
    """Return the record in a run folder, None if there is none."""
    if not run.record.exists():
        return None
    content = calib_records.read_record(dict[str, Any], run.record, _ADVICE)
    # The format first: a record of another version must not be half understood.
    if content.get("format") != FORMAT:
        raise GaqError(f"{run.record} is not a run record of format {FORMAT}. {_ADVICE}.")
    record = calib_records.check_record(_Record, content, run.record, _ADVICE)
    if record.settings:
        calib_records.check_record(_Settings, record.settings, f"{run.record}, settings", _ADVICE, others=True)
    for number, entry in enumerate(record.journal):
        calib_records.check_record(_Entry, entry, f"{run.record}, journal.{number}", _ADVICE, others=True)
    return RunRecord(settings=record.settings, journal=record.journal)


@dataclass(frozen=True, kw_only=True)
class _Record:
    format: int
    settings: dict[str, Any]
    journal: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Of the settings, what other commands read; the rest is only compared."""

    images: Annotated[int, Field(ge=1, le=1 << 20)]
    model: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Of an entry of the journal, what other commands and pages read."""

    step: str
    version: str = ""
    command: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    engine: Text | None = None
    sqnr_db: tuple[float, ...] | None = None
    seconds: float | None = None
    call_batch: int | None = None
    call_seconds: dict[str, PositiveFloat] = field(default_factory=dict)
    collect_seconds: float | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: float | None = None


def _write(run: Run, record: RunRecord) -> None:
    fields = {"format": FORMAT, "settings": record.settings, "journal": record.journal}
    write_atomically(run.record, json.dumps(fields, indent=1).encode())


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
