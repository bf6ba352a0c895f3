"""The report is written where it is asked for, or in the run folder, from what was measured there."""

from pathlib import Path
from typing import Any

import pytest

from gaq_export.report import report, report_page
from gaq_export.report.report import ReportOptions
from gaq_export.report.write import write_report


@pytest.mark.parametrize("out", [None, "page.html"])
def test_the_page_is_what_was_measured_of_the_run(
    out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(folder: Path, path: Path, options: ReportOptions, **more: Any) -> tuple[Path, Path, int]:
        return folder, path, options.rounds

    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report_page, "render", repr)
    wanted = tmp_path / (out or "run/report.html")
    path = write_report(folder=tmp_path / "run", out=out and wanted, options=ReportOptions(rounds=7))
    assert path == wanted
    assert path.read_text() == repr((tmp_path / "run", wanted, 7))
