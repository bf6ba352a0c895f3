"""Sentences about made-up results: they say no more than the numbers do."""

import pytest

import verdicts
from tests.gaq_export.comparison.test_tables import scores, table


def test_a_steady_lead_is_more_than_twice_its_standard_error_however_much_seeds_differ() -> None:
    text = verdicts.standing("W4A8", table(uniform=[20.0, 25.0, 30.0], gac=[21.0, 26.1, 30.9], mse=[19.0, 24.0, 29.0]))
    assert text == (
        "W4A8: `gac` has the highest mean SQNR, 26.00 dB. Its lead over `uniform`, seed by seed, is 1.000 ± 0.100 dB: "
        "more than twice its standard error (0.058 dB, n = 3)."
    )


def test_a_lead_that_changes_with_the_seed_is_not() -> None:
    text = verdicts.standing("W4A8", table(uniform=[20.0, 20.0, 20.0], gac=[23.0, 19.0, 19.5]))
    assert "is 0.500 ± 2.179 dB: not more than twice its standard error (1.258 dB, n = 3)." in text


def test_the_baseline_may_lead_and_is_then_compared_with_the_next() -> None:
    text = verdicts.standing("W3A8", table(uniform=[20.0, 20.1], gac=[19.0, 19.1], mse=[19.5, 19.6]))
    assert "`uniform` has the highest mean SQNR, 20.05 dB. Its lead over `mse`, seed by seed, is 0.500" in text


def test_equal_rows_share_the_first_place() -> None:
    text = verdicts.standing("W4A8", table(rtn=[1.0], uniform=[20.0], gac=[20.0]))
    assert text == "W4A8: `uniform`, `gac` share the highest mean SQNR, 20.00 dB."


def test_only_seeds_that_all_rows_have_are_compared() -> None:
    text = verdicts.standing("W4A8", table(uniform=[20.0, 99.0], gac=[21.0]))
    assert "`gac` has the highest mean SQNR, 21.00 dB" in text
    assert "is 1.000 dB: one seed, so how much of it is chance is unknown." in text


@pytest.mark.parametrize("rows", [{}, {"gac": [1.0]}, {"uniform": [1.0], "gac": []}])
def test_nothing_is_said_where_nothing_can_be_compared(rows: dict[str, list[float]]) -> None:
    assert "nothing to compare" in verdicts.standing("W4A8", table(**rows))


def test_the_distance_closed_is_the_share_of_the_squared_error_seed_by_seed() -> None:
    results = {
        "uniform": {0: scores(0, 4.0, 2.0), 1: scores(0, 10.0, 1.0)},
        "gac": {0: scores(0, 1.0, 1.5), 1: scores(0, 4.0, 1.25)},
    }
    text = verdicts.distance_closed("W4A8", results, "gac")
    assert "weights and activations, 67.5 ± 10.6 % (seeds: 75.0, 60.0); the goal of 50 % is reached." in text
    assert "weights only, 0.0 ± 35.4 % (seeds: 25.0, -25.0); the goal of 50 % is not reached." in text
    assert "With float activations `uniform` has 30.0 ± 28.3 % of the error" in text


def test_block_losses_are_compared_seed_by_seed_and_named_where_they_differ_most() -> None:
    results = {
        "uniform": {0: scores(0, blocks=(1.0, 1.0, 2.0)), 1: scores(0, blocks=(2.0, 2.0, 4.0))},
        "gac": {0: scores(0, blocks=(1.0, 0.5, 2.5)), 1: scores(0, blocks=(2.0, 1.4, 6.0)), 2: scores(0)},
    }
    text = verdicts.block_losses("W4A8", results, "gac")
    assert "`gac` has 0.600 (`block1`) to 1.375 (`block2`) times the loss of `uniform`" in text
    assert "3 blocks, median 1.000; mean over seeds." in text


@pytest.mark.parametrize(("n", "expected"), [(2, 0.2952), (3, 0.1835), (11, 0.0734)])
def test_chance_beyond_two_standard_errors_is_students(n: int, expected: float) -> None:
    assert verdicts.chance_beyond(2, n) == pytest.approx(expected, abs=1e-4)


def test_one_seed_is_given_no_standard_error() -> None:
    assert "One seed" in verdicts.caution(1)
    assert "18 times in 100" in verdicts.caution(3)
