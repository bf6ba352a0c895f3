"""Choices: every member names itself, in JSON and in messages, and every rule has its function."""

import json
from enum import StrEnum

import pytest

from calib import choices, float_layers, gptq, omega, ranges, selection, step_scales
from calib.choices import OmegaRule, RoundingStart, SelectionRule, StepScales, choose
from calib.errors import CalibError

KINDS = [value for value in vars(choices).values() if isinstance(value, type) and issubclass(value, StrEnum)]
KINDS.remove(StrEnum)


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_written_as_their_words(kind: type[StrEnum]) -> None:
    for member in kind:
        assert json.dumps(member) == json.dumps(member.value)
        assert f"{member}" == member.value
        assert choose(kind, member.value, "word") is member


def test_another_word_is_refused_with_all_choices_and_the_nearest() -> None:
    with pytest.raises(
        CalibError, match=r"^Unknown rule 'unifrom'\. Choose one of \['density', .*\]\. Did you mean 'uniform'\?$"
    ):
        choose(SelectionRule, "unifrom", "rule")


def test_every_rule_has_a_function_or_needs_none() -> None:
    assert set(ranges.RULES) == set(choices.RangeRule)
    assert set(gptq.STARTS) == set(RoundingStart)
    assert set(float_layers.CONVENTIONS) == set(choices.Convention)
    assert set(omega.RULES) | {OmegaRule.UNIFORM, OmegaRule.RANDOM} == set(OmegaRule)
    assert set(selection.RULES) | {SelectionRule.UNIFORM} == set(SelectionRule)
    assert set(step_scales.RULES) | {StepScales.RANGES} == set(StepScales)
