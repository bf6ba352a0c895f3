"""Measure an engine and write the report about it."""

from pathlib import Path

from calib.files import write_atomically
from gaq_export import run as runs
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.noise_sqnr import OnStage
from gaq_export.report import report, report_page
from gaq_export.report.report import ReportOptions
from gaq_export.run import Run


def write_report(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path | None = None,
    options: ReportOptions | None = None,
    model: LoadedModel | None = None,
    on_step: OnStage = lambda what, done, total: None,
) -> Path:
    """Write one HTML page about an engine and the calibration that it was built from, and return its path.

    Args:
        folder: run folder with a finished plan.
        out: where to write; report.html in the run folder if None.
        options: which engine and evaluation, and what to measure; the defaults if None.
        model: the float model; loaded again from the plan's record if None.
        on_step: called with (what is being done, done, total).

    Raises:
        GaqError, CalibError, EngineError: no plan, no engine of it, another model, or no evaluation of this engine.
    """
    run = Run(folder=Path(folder))
    path = Path(out or run.report)
    measured = report.measure(run.folder, path, options or ReportOptions(), model=model, on_step=on_step)
    # Rendered before anything is written: a failure leaves an older page as it was.
    write_atomically(path, report_page.render(measured).encode())
    return path
