"""Scores are read back from the cells' files, in decibels and in the units of the page."""

import json
import math
from pathlib import Path

import pytest

from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.results import table_at
from gaq_export.comparison.spec import Comparison
from tests.gaq_export.comparison.conftest import comparison_of


def test_fewer_activation_bits_and_nothing_learned_are_further_from_float(measured: Comparison) -> None:
    a8, a4 = (table_at(measured, 4, abits) for abits in (8, 4))
    for row in ("rtn", "uniform"):
        assert a8[row][0].mean_db > a4[row][0].mean_db + 3
        assert a8[row][0].weights_db == a4[row][0].weights_db > a8[row][0].mean_db
    assert a8["uniform"][0].spread == 0


def test_scores_are_those_of_the_cells_files(measured: Comparison) -> None:
    cell = measured.cells[0]
    record = json.loads(measured.path(cell, ".json").read_text())
    at = record["activations"]["8"]
    signal = yardstick.facts(measured.yardstick).signal
    scores = table_at(measured, 4, 8)[cell.row][cell.seed]
    assert scores.steps_db == pytest.approx([10 * math.log10(s / e) for s, e in zip(signal, at["error"], strict=True)])
    assert scores.pooled_db == pytest.approx(10 * math.log10(sum(signal) / sum(at["error"])))
    assert scores.megabytes == at["bytes"] / 1e6
    assert (scores.seconds, scores.peak_mib) == (record["seconds"], record["peak_mib"])
    assert scores.fd_real is None


def test_rows_without_any_seed_are_left_out(measured: Comparison) -> None:
    assert list(table_at(measured, 4, 8)) == ["rtn", "gptq", "uniform"]
    assert table_at(measured, 8, 8) == {}


def test_a_row_shows_up_with_its_first_seed(model, tmp_path: Path) -> None:
    comparison = comparison_of(model, tmp_path, images=0)
    runner.work(comparison, runner.PREPARE)
    runner.work(comparison, comparison.cells[0].name)
    (row,) = table_at(comparison, 4, 4).items()
    assert row[0] == "rtn"
    assert row[1][0].psnr_db is None
