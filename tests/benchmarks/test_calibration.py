"""The page of the calibration benchmark, from a tiny comparison."""

import sys
from pathlib import Path

import pytest

import calibration
from calib.choices import OmegaRule
from gaq_export.comparison import runner
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel, wrap
from tests.gaq_export.comparison.conftest import comparison_of, measure_all_but_one


@pytest.fixture
def model(make_foreign, tiny_schedule) -> LoadedModel:
    return wrap(make_foreign(), shape=(1, 8, 8), schedule=tiny_schedule, sampler=SamplerSpec(steps=4))


def test_every_omega_rule_is_a_rung_that_says_what_it_is() -> None:
    assert set(OmegaRule) <= set(calibration.MEANING)


def test_a_page_shows_every_row_and_says_what_is_missing(model, tmp_path: Path, monkeypatch) -> None:
    measured = measure_all_but_one(comparison_of(model, tmp_path / "bench"))
    monkeypatch.setattr(sys, "argv", ["/elsewhere/calibration.py", "--folder", "/a/b/bench", "--report-only"])
    calibration.write_page(measured, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "    python benchmarks/calibration.py --folder bench\n" in text
    assert text.count("\n| `rtn` |") == text.count("\n| `uniform` |") == 2
    assert "Not measured: gac-w4-seed0." in text
    assert "![SQNR at every step](page.svg)" in text
    assert (tmp_path / "page.svg").read_text(encoding="utf-8").count("uniform") >= 2
    runner.work(measured, "gac-w4-seed0")
    calibration.write_page(measured, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Not measured" not in text
    assert "the goal of 50 %" in text


def test_a_folder_without_results_gives_no_page(model, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="holds no results yet"):
        calibration.write_page(comparison_of(model, tmp_path), tmp_path / "page.md")
