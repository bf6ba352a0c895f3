"""Which recipe suits this model and these bits? Calibrate with the cheap ones; take the one closest to float."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calib.plan import QuantPlan
from gaq_export import run as runs
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.noise_sqnr import OnStage
from gaq_export.quantize.presets import Preset
from gaq_export.run import Run

CANDIDATES = ("rtn", "adaround", "qdrop", "tfmq")
IMAGES = 8  # fresh trajectories on which the recipes are compared


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One recipe's result: SQNR of the predicted noise on fresh trajectories, in dB, and the seconds it took."""

    recipe: str
    mean_db: float
    worst_db: float
    seconds: float


def choose(
    model: LoadedModel,
    candidates: Mapping[str, Preset],
    folder: Path,
    calibrate: Callable[..., QuantPlan],
    on_step: OnStage = lambda what, done, total: None,
) -> list[Tried]:
    """Calibrate with each recipe in a separate folder, and make `folder` the run of the best.

    Args:
        model: the float model.
        candidates: preset with the recipe's settings, by recipe.
        folder: run folder; the candidates' run folders stay in `auto` inside it.
        calibrate: called as (preset, folder=...); makes the plan in that run folder, or returns the one that is there.
        on_step: called with (what is being done, done, total).

    Returns:
        All results, the best first.
    """
    tried = []
    folders = folders_of(candidates, folder)
    for name, preset in candidates.items():
        share(Run(folder=next(iter(folders.values()))), Run(folder=folders[name]))
        tried.append(measure(model, name, partial(calibrate, preset, folder=folders[name]), on_step))
    return keep_best(tried, folder)


def folders_of(candidates: Iterable[str], folder: Path) -> dict[str, Path]:
    """Return the run folder of each candidate, by recipe, inside that of the best."""
    return {name: folder / "auto" / name for name in candidates}


def measure(
    model: LoadedModel,
    recipe: str,
    calibrate: Callable[[], QuantPlan],
    on_step: OnStage = lambda what, done, total: None,
) -> Tried:
    """Calibrate with a recipe and compare the plan with the float model.

    Args:
        model: the float model.
        recipe: its name.
        calibrate: makes the plan, or returns the one that is there.
        on_step: called with (what is being done, done, total) while they are compared.
    """
    started = time.perf_counter()
    plan = calibrate()
    seconds = time.perf_counter() - started  # of calibration alone: the comparison below is no part of a recipe
    decibels = noise_sqnr.of_plan(model, plan, IMAGES, on_step).both.mean(1)  # (S, N) -> (S,)
    return Tried(
        recipe=recipe, mean_db=float(decibels.mean()), worst_db=float(decibels.min()), seconds=round(seconds, 1)
    )


def keep_best(tried: Iterable[Tried], folder: Path) -> list[Tried]:
    """Make `folder` the run of the best candidate; return all, the best first."""
    ranked = sorted(tried, key=lambda result: -result.mean_db)
    # Copied and not moved: the next call finds every candidate finished.
    best = folders_of([ranked[0].recipe], folder)[ranked[0].recipe]
    shutil.copytree(best, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.log"))
    runs.add_entry(Run(folder=folder), "auto", tried={result.recipe: round(result.mean_db, 2) for result in ranked})
    return ranked


def share(first: Run, run: Run) -> None:
    """Copy what all recipes have in common, calibration images and times of layers, from the first run to another."""
    if run == first or run.calibration.exists():
        return
    shutil.copytree(first.calibration, run.calibration)
    if first.times.exists():
        shutil.copy(first.times, run.times)


def explain(tried: list[Tried]) -> str:
    """Return a sentence that says which recipe was chosen, and why."""
    best, *rest = tried
    others = ", ".join(f"{result.recipe} {result.mean_db:.1f}" for result in rest)
    lead = best.mean_db - rest[0].mean_db
    return (
        f"{best.recipe}: {best.mean_db:.1f} dB SQNR of the noise on {IMAGES} fresh trajectories, mean over steps "
        f"({best.worst_db:.1f} at the worst), {lead:.1f} ahead of the next; {others}"
    )
