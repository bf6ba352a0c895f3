"""Measure a finished calibration and write the page about it."""

from functools import partial
from pathlib import Path

from calib.files import write_atomically
from calib.plan import load_plan
from gaq_export import folders
from gaq_export import run as runs
from gaq_export.devices import ON_HOST, Device
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import files_of_model, find_model, provenance_of
from gaq_export.quantize.noise_sqnr import OnStage
from gaq_export.quantize.trajectories import collect
from gaq_export.report import inspection, inspection_page
from gaq_export.report.inspection import Calibrated, Inspection, InspectionOptions
from gaq_export.run import Run


def inspect(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path | None = None,
    block: str | None = None,
    images: int = 8,
    model: LoadedModel | None = None,
    device: Device = ON_HOST,
    on_step: OnStage = lambda what, done, total: None,
) -> Path:
    """Write one HTML page about a finished calibration, and return its path.

    Args:
        folder: run folder with a finished plan.
        out: where to write; inspect.html in the run folder if None.
        block: which block to measure closely; the one with the largest loss at nearest rounding if None.
        images: fresh trajectories on which the predicted noise is compared with the float model's.
        model: the float model; loaded again by the plan's provenance if None.
        device: where a model that is loaded again computes.
        on_step: called with (what is being done, done, total).

    Raises:
        GaqError, CalibError: no plan, an unknown block, another model, or a page that cannot be written.
    """
    run = Run(folder=Path(folder))
    plan = load_plan(run.plan)
    path = Path(out or run.inspection)
    model = find_model(provenance_of(plan), model, run.folder, device)
    check_page(run, path, model)
    options = InspectionOptions(block=block, images=images)
    calibrated = Calibrated(model=model, plan=plan)
    inspection, origin = examine(run, calibrated, options, beside=path, on_step=on_step)
    write_atomically(path, inspection_page.render(plan, inspection, origin).encode())
    return path


def check_page(run: Run, page: Path, model: LoadedModel) -> None:
    """Raise GaqError if a page would take the place of something that is needed."""
    taken = [*runs.files_of_calibration(run), *runs.files_of_engines(run), *files_of_model(model)]
    folders.check_outputs([page], [*taken, *run.folder.glob("unet.*.onnx*")])


def examine(
    run: Run, calibrated: Calibrated, options: InspectionOptions, *, beside: Path, on_step: OnStage
) -> tuple[Inspection, inspection_page.Origin]:
    """Measure what a page about a calibration shows.

    Args:
        run: where the calibration was done.
        calibrated: its plan, and the float model.
        options: block and number of images.
        beside: the page; scratch files lie in the same folder.
        on_step: as for `inspect`.
    """
    record = runs.read_record(run)
    with folders.staging(beside) as staged:
        # Recordings of a block may not fit into memory, so they go beside the page, where there is room to write.
        # The run folder has these trajectories already, unless someone deleted them.
        data = collect(
            calibrated.model,
            provenance_of(calibrated.plan).sampler,
            images=record.settings["images"],
            seed=calibrated.plan.config.seed,
            folder=run.calibration,
            on_step=partial(on_step, "collecting"),
        )
        measured = inspection.examine(calibrated, data, options, scratch=staged / "scratch", on_step=on_step)
    return measured, inspection_page.Origin(settings=record.settings, journal=record.last("calibrate"))
