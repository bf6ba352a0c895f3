"""Which recipe suits this model and these bits? Calibrate with the cheap ones, keep what predicts the noise best."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from calib.plan import QuantPlan
from gaq_export import run as runs
from gaq_export.evaluation import noise_sqnr
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import Preset
from gaq_export.run import Run

CANDIDATES = ("rtn", "adaround", "qdrop", "tfmq")
IMAGES = 8  # fresh trajectories that they are judged on


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One recipe's result: SQNR of the predicted noise on fresh trajectories, in dB, and what it took."""

    recipe: str
    mean_db: float
    worst_db: float
    seconds: float


def choose(
    model: LoadedModel,
    candidates: Mapping[str, Preset],
    folder: Path,
    calibrate: Callable[..., QuantPlan],
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Tried]:
    """Calibrate with each recipe in a folder of its own, and make `folder` the run of the best; best first.

    Args:
        model: the float model.
        candidates: schedule and settings by recipe.
        folder: run folder; those of the candidates are in `auto` inside it, and kept.
        calibrate: called as (preset, folder=...), makes the plan in that run folder or finds it there.
        on_step: told what is at work, how much of it is done, of how much.
    """
    tried, places = [], {name: folder / "auto" / name for name in candidates}
    for name, chosen in candidates.items():
        started, first = time.perf_counter(), next(iter(places.values()))
        if places[name] != first and not Run(folder=places[name]).calibration.exists():
            shutil.copytree(Run(folder=first).calibration, Run(folder=places[name]).calibration)
            if Run(folder=first).times.exists():
                shutil.copy(Run(folder=first).times, Run(folder=places[name]).times)
        plan = calibrate(chosen, folder=places[name])
        seconds = time.perf_counter() - started
        values = noise_sqnr.of_plan(model, plan, IMAGES, on_step).both.mean(1)
        tried.append(
            Tried(recipe=name, mean_db=float(values.mean()), worst_db=float(values.min()), seconds=round(seconds, 1))
        )
    tried.sort(key=lambda one: -one.mean_db)
    best = tried[0].recipe
    shutil.copytree(places[best], folder, dirs_exist_ok=True)
    runs.note(Run(folder=folder), "auto", tried={one.recipe: round(one.mean_db, 2) for one in tried})
    return tried


def explain(tried: list[Tried]) -> str:
    """Say which recipe was chosen, and why."""
    best, rest = tried[0], tried[1:]
    others = ", ".join(f"{one.recipe} {one.mean_db:.1f}" for one in rest)
    lead = best.mean_db - rest[0].mean_db
    return (
        f"{best.recipe}: {best.mean_db:.1f} dB SQNR of the noise on {IMAGES} fresh trajectories, mean over steps "
        f"({best.worst_db:.1f} at the worst), {lead:.1f} ahead of the next; {others}"
    )
