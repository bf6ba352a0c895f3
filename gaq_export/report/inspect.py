"""Measure a finished calibration and write the page about it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan
from gaq_export import run as runs
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model, provenance_of
from gaq_export.quantize.trajectories import collect
from gaq_export.report import inspection, inspection_page
from gaq_export.report.inspection import Inspection
from gaq_export.run import Run


def inspect(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path | None = None,
    block: str | None = None,
    images: int = 8,
    model: LoadedModel | None = None,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write one HTML page with figures on a finished calibration, and return its path.

    Args:
        folder: run folder with a finished plan.
        out: where to write; inspect.html in the run folder if None.
        block: which block to look into; the one with the largest loss at nearest rounding if None.
        images: fresh trajectories on which the noise prediction is compared with the float model's.
        model: the float model; found again from the plan if None.
        on_step: told what is at work, how much of it is done, of how much.

    Raises:
        GaqError, CalibError: no plan, an unknown block, another model, or a page that cannot be written.
    """
    run = Run(folder=Path(folder))
    plan, path = load_plan(run.plan), Path(out or run.inspection)
    model = find_model(provenance_of(plan), model, run.folder)
    found, origin = examine(run, plan, model, path, block=block, images=images, on_step=on_step)
    write_atomically(path, inspection_page.render(plan, found, origin).encode())
    return path


def examine(
    run: Run,
    plan: QuantPlan,
    model: LoadedModel,
    out: Path,
    *,
    block: str | None,
    images: int,
    on_step: Callable[[str, int, int], None],
) -> tuple[Inspection, inspection_page.Origin]:
    """Measure what a page about a calibration shows, the arguments as for `inspect`; scratch files lie beside `out`."""
    record = runs.read_record(run)
    with runs.staging(out) as staged:
        data = collect(
            model,
            provenance_of(plan).sampler,
            images=record.settings["images"],
            seed=plan.config.seed,
            folder=run.calibration,
            on_step=partial(on_step, "collecting"),
        )
        found = inspection.examine(
            model, plan, data, block=block, images=images, scratch=staged / "scratch", on_step=on_step
        )
    return found, inspection_page.Origin(settings=record.settings, journal=record.last("calibrate"))
