"""What a comparison of ways to calibrate measures, and what its folder holds.

A cell is a row of the table (a way to calibrate), a seed and a weight width; `runner` measures them.
"""

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
from calib import config as configs
from calib.config import BITS, QuantConfig
from calib.data import CalibrationSet
from calib.files import write_atomically
from calib.records import read_record
from gaq_export._version import __version__
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import Preset, preset
from gaq_export.quantize.recipes import find_recipe
from gaq_export.quantize.trajectories import collect

ROOT = Path(__file__).resolve().parent.parent.parent
Row = Callable[[QuantConfig], QuantConfig]  # the preset's config -> the row's
Bits = tuple[int, int]  # weights, activations


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One calibration."""

    row: str
    seed: int
    wbits: int

    @property
    def name(self) -> str:
        """What files and the command line call it."""
        return f"{self.row}-w{self.wbits}-seed{self.seed}"  # no activation bits: one cell measures all widths


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ways to calibrate, side by side.

    Attributes:
        yardstick: measures all cells; its folder holds the results too.
        preset: what every row starts from.
        rows: how each row changes the preset's config.
        bits: weight and activation widths, one table each.
        seeds: each sets mini-batches, split and calibration images together, as a user's --seed does.
        workers: how many cells run at the same time.
        weights_alone: whether the error with float activations is measured too.
    """

    yardstick: Yardstick
    preset: Preset
    rows: Mapping[str, Row]
    bits: tuple[Bits, ...]
    seeds: tuple[int, ...]
    workers: int
    weights_alone: bool = False

    @property
    def model(self) -> LoadedModel:
        """The float model."""
        return self.yardstick.model

    @property
    def cells(self) -> list[Cell]:
        """All cells, one seed after the other, so that a part of them is a fair comparison already."""
        widths = dict.fromkeys(w for w, _ in self.bits)  # a set would lose the user's order
        return [Cell(row=r, seed=s, wbits=w) for s in self.seeds for w in widths for r in self.rows]

    def config(self, cell: Cell) -> QuantConfig:
        """Return how a cell is calibrated; its activation width is still the preset's."""
        base = self.preset.config
        weight = dataclasses.replace(base.weight, bits=cell.wbits)
        return self.rows[cell.row](dataclasses.replace(base, weight=weight, seed=cell.seed))

    def path(self, cell: Cell, suffix: str) -> Path:
        """Return a file of a cell; its name holds a digest of the config, so that a changed row starts anew."""
        # Of the config alone: the model and the sampler are the folder's, see `claim`.
        digest = hashlib.sha256(json.dumps(configs.to_json(self.config(cell))).encode()).hexdigest()
        return self.yardstick.folder / "cells" / f"{cell.name}-{digest[:8]}{suffix}"


def recipe_rows(names: Sequence[str]) -> dict[str, Row]:
    """Return a row for each recipe.

    Raises:
        GaqError: a recipe is unknown.
    """
    return {name: find_recipe(name).apply for name in names}


def parse_bits(text: str) -> tuple[Bits, ...]:
    """Read "W4A8,W8A8".

    >>> parse_bits("W4A8,W8A8")
    ((4, 8), (8, 8))

    Raises:
        GaqError: the text has another form, or a width that no grid has.
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
    """Read "0,1,2"; raise GaqError if it has another form."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise GaqError(f"Found seeds {text!r}; write whole numbers, as in 0,1,2.") from error


def adjusted_preset(name: str, iterations: int | None, images: int | None = None) -> Preset:
    """Return the preset `name` with other numbers of iterations and calibration images, where they are not None."""
    base = preset(name)
    base = base if images is None else dataclasses.replace(base, images=images)
    if iterations is None:
        return base
    reconstruction = dataclasses.replace(base.config.reconstruction, iterations=iterations)
    return dataclasses.replace(base, config=dataclasses.replace(base.config, reconstruction=reconstruction))


def calibration_set(model: LoadedModel, preset: Preset, seed: int, folder: Path) -> CalibrationSet:
    """Return the preset's calibration set of `seed`; finished parts are stored in a folder inside `folder`."""
    return collect(model, model.spec.sampler, images=preset.images, seed=seed, folder=folder / f"calibration-{seed}")


def claim(comparison: Comparison) -> None:
    """Write down what the folder's numbers depend on; raise GaqError if it holds numbers of something else."""
    yardstick = comparison.yardstick
    conditioning = comparison.model.conditioning
    path = yardstick.folder / "settings.json"
    settings = {
        "model": comparison.model.fingerprint,
        "sampler": str(comparison.model.spec.sampler),
        "conditions": conditioning and conditioning.sha256,
        "calibration images": comparison.preset.images,
        "config": configs.to_json(comparison.preset.config),
        "images": yardstick.images,
        "draw": yardstick.computed_by,
        "data": yardstick.data and _sha256(yardstick.data),
        "features": yardstick.classifier and _sha256(yardstick.classifier),
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they are in the file
    advice = "Give another --folder, or delete this one"
    old = read_record(dict[str, Any], path, advice) if path.exists() else settings
    # Rows, bits and seeds are not among them: more of those may be added to the same folder.
    changed = [key for key in settings if old.get(key) != settings[key]]
    if changed:
        raise GaqError(
            f"{yardstick.folder} holds results with other settings ({changed[0]}). Give another --folder, or delete "
            "this one."
        )
    write_atomically(path, json.dumps(settings, indent=1).encode())


def version() -> str:
    """Return the version of gaq-export, and the commit if this is a clone of its repository."""
    if not (ROOT / ".git").exists():
        return __version__
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{__version__} ({done.stdout.strip() or 'no commit'})"


def _sha256(path: Path) -> str:
    try:
        return engines.sha256_of(path)
    except OSError as error:
        raise GaqError(f"Cannot read {path}: {error.strerror}.") from error
