"""What a comparison consists of: its cells, how each is calibrated, and the folder that holds their numbers."""

import dataclasses
from pathlib import Path

import pytest

from gaq_export.comparison.spec import (
    Cell,
    Comparison,
    adjusted_preset,
    claim,
    parse_bits,
    parse_seeds,
    recipe_rows,
    version,
)
from gaq_export.errors import GaqError
from gaq_export.quantize.presets import preset
from tests.gaq_export.comparison.conftest import comparison_of


def test_cells_come_seed_by_seed_so_that_a_part_is_a_fair_comparison(model, tmp_path: Path) -> None:
    comparison = dataclasses.replace(comparison_of(model, tmp_path), seeds=(0, 1), bits=((4, 8), (4, 4), (8, 8)))
    assert [cell.seed for cell in comparison.cells] == [0] * 8 + [1] * 8  # four rows, two weight widths
    assert comparison.cells[0] == Cell(row="rtn", seed=0, wbits=4)
    assert comparison.cells[0].name == "rtn-w4-seed0"


def test_a_cell_has_its_bits_and_its_seed_and_what_its_row_changes(model, tmp_path: Path) -> None:
    comparison = comparison_of(model, tmp_path)
    config = comparison.config(Cell(row="uniform", seed=3, wbits=5))
    assert (config.weight.bits, config.seed, config.omega.rule) == (5, 3, "uniform")


def test_a_row_that_changes_has_other_files(model, tmp_path: Path) -> None:
    comparison, cell = comparison_of(model, tmp_path), Cell(row="uniform", seed=0, wbits=4)
    other = dataclasses.replace(comparison, preset=adjusted_preset("tiny", 4))
    assert comparison.path(cell, ".json") != other.path(cell, ".json")
    assert comparison.path(cell, ".json") == comparison_of(model, tmp_path).path(cell, ".json")


def test_a_folder_of_other_measurements_is_refused(measured: Comparison) -> None:
    claim(dataclasses.replace(measured, seeds=(0, 1), bits=((8, 8),)))
    other = dataclasses.replace(measured.yardstick, images=3)
    with pytest.raises(GaqError, match=r"holds results with other settings \(images\)\. Give another --folder"):
        claim(dataclasses.replace(measured, yardstick=other))


def test_a_preset_is_adjusted_only_where_a_number_is_given() -> None:
    assert adjusted_preset("tiny", None) == preset("tiny")
    adjusted = adjusted_preset("tiny", 7, 5)
    assert (adjusted.config.reconstruction.iterations, adjusted.images) == (7, 5)
    assert adjusted.config.omega == preset("tiny").config.omega


def test_recipes_are_rows() -> None:
    rows = recipe_rows(["rtn", "adaround"])
    assert list(rows) == ["rtn", "adaround"]
    assert rows["rtn"](preset("tiny").config) != rows["adaround"](preset("tiny").config)


def test_bits_are_read_in_any_case_and_refused_in_any_other_form() -> None:
    assert parse_bits("w4a8,W8A8") == ((4, 8), (8, 8))
    with pytest.raises(GaqError, match="write them as W4A8"):
        parse_bits("4/8")
    with pytest.raises(GaqError, match="between 2 and 8"):
        parse_bits("W4A16")


def test_seeds_are_whole_numbers() -> None:
    assert parse_seeds("0,3") == (0, 3)
    with pytest.raises(GaqError, match="Found seeds '0;1'; write whole numbers"):
        parse_seeds("0;1")


def test_the_version_names_the_commit_of_a_clone() -> None:
    assert version().partition(" ")[0]
