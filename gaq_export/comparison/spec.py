"""What a comparison of ways to calibrate measures, and what its folder holds.

A cell is a row of the table (a way to calibrate), a seed and a weight width; see `cells.py` for how it is measured.
"""

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import engines
from calib import config as configs
from calib.config import BITS, QuantConfig
from calib.data import CalibrationSet
from calib.files import write_atomically
from gaq_export._version import __version__
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import Preset, preset
from gaq_export.quantize.trajectories import collect

ROOT = Path(__file__).resolve().parent.parent.parent
Row = Callable[[QuantConfig], QuantConfig]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One calibration."""

    row: str
    seed: int
    wbits: int

    @property
    def name(self) -> str:
        """What files and the command line call it."""
        return f"{self.row}-w{self.wbits}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ways to calibrate, side by side.

    Attributes:
        yardstick: what all cells are measured with; its folder keeps the results too.
        schedule: the preset that every row starts from.
        rows: how each row changes the preset's config.
        bits: (weight, activation) widths, a table each.
        seeds: of mini-batches, split and calibration images together, as a user's --seed.
        workers: how many cells run beside each other.
        weights_alone: whether the error with float activations is measured too.
    """

    yardstick: Yardstick
    schedule: Preset
    rows: Mapping[str, Row]
    bits: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    workers: int
    weights_alone: bool = False

    @property
    def model(self) -> LoadedModel:
        """The float model."""
        return self.yardstick.model

    @property
    def cells(self) -> list[Cell]:
        """All cells, one seed after the other so that a part of them is a fair comparison already."""
        widths = dict.fromkeys(w for w, _ in self.bits)
        return [Cell(row=r, seed=s, wbits=w) for s in self.seeds for w in widths for r in self.rows]

    def config(self, cell: Cell) -> QuantConfig:
        """Return how a cell is calibrated; its activation width is still the preset's."""
        base = self.schedule.config
        weight = dataclasses.replace(base.weight, bits=cell.wbits)
        return self.rows[cell.row](dataclasses.replace(base, weight=weight, seed=cell.seed))

    def path(self, cell: Cell, suffix: str) -> Path:
        """Return a file of a cell; its name holds a digest of the config, so that an altered row starts afresh."""
        digest = hashlib.sha256(json.dumps(configs.to_json(self.config(cell))).encode()).hexdigest()
        return self.yardstick.folder / "cells" / f"{cell.name}-{digest[:8]}{suffix}"


def parse_bits(text: str) -> tuple[tuple[int, int], ...]:
    """Read "W4A8,W8A8".

    >>> parse_bits("W4A8,W8A8")
    ((4, 8), (8, 8))
    """
    try:
        pairs = [part.upper().removeprefix("W").split("A") for part in text.split(",")]
        bits = tuple((int(w), int(a)) for w, a in pairs)
    except ValueError as error:
        raise GaqError(f"Found bits {text!r}; write them as W4A8,W8A8.") from error
    if any(width not in BITS for pair in bits for width in pair):
        raise GaqError(f"Found bits {text!r}; every width must lie between {BITS[0]} and {BITS[-1]}.")
    return bits


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read "0,1,2"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise GaqError(f"Found seeds {text!r}; write whole numbers, as in 0,1,2.") from error


def schedule(name: str, iterations: int | None, images: int | None = None) -> Preset:
    """Return the preset `name`, its iterations and calibration images replaced if given."""
    chosen = preset(name)
    chosen = chosen if images is None else dataclasses.replace(chosen, images=images)
    if iterations is None:
        return chosen
    reconstruction = dataclasses.replace(chosen.config.reconstruction, iterations=iterations)
    return dataclasses.replace(chosen, config=dataclasses.replace(chosen.config, reconstruction=reconstruction))


def collected(model: LoadedModel, chosen: Preset, seed: int, folder: Path) -> CalibrationSet:
    """Return the preset's calibration images of `seed`, kept in a folder inside `folder`."""
    return collect(model, model.spec.sampler, images=chosen.images, seed=seed, folder=folder / f"calibration-{seed}")


def claim(bench: Comparison) -> None:
    """Write down what the folder's numbers depend on; raise GaqError if it holds numbers of something else."""
    y, path, conditioning = bench.yardstick, bench.yardstick.folder / "settings.json", bench.model.conditioning
    settings = {
        "model": bench.model.fingerprint,
        "sampler": str(bench.model.spec.sampler),
        "conditions": conditioning and conditioning.sha256,
        "calibration images": bench.schedule.images,
        "config": configs.to_json(bench.schedule.config),
        "images": y.images,
        "draw": y.draw,
        "data": y.data and _sha256(y.data),
        "features": y.classifier and _sha256(y.classifier),
    }
    settings = json.loads(json.dumps(settings))
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    changed = [key for key in settings if old.get(key) != settings[key]]
    if changed:
        raise GaqError(
            f"{y.folder} holds results with other settings ({changed[0]}). Give another --folder, or delete this one."
        )
    write_atomically(path, json.dumps(settings, indent=1).encode())


def version() -> str:
    """Return the version of gaq-export, and the commit it stands at if this is a clone of its repository."""
    if not (ROOT / ".git").exists():
        return __version__
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{__version__} ({found.stdout.strip() or 'no commit'})"


def _sha256(path: Path) -> str:
    try:
        return engines.sha256_of(path)
    except OSError as error:
        raise GaqError(f"Cannot read {path}: {error.strerror}.") from error
