"""Settings: what they refuse, and that they survive being written down."""

import json

import pytest

from calib import omega, ranges
from calib.choices import OmegaRule, RangeRule
from calib.config import (
    ActivationConfig,
    OmegaConfig,
    QuantConfig,
    ReconstructionConfig,
    WeightConfig,
    to_json,
)
from calib.errors import CalibError
from calib.records import parse_record

OTHER = QuantConfig(
    weight=WeightConfig(bits=3, norm=2.0, candidates=5),
    activation=ActivationConfig(bits=5, rule="minmax", batches=7, per_step=True),
    reconstruction=ReconstructionConfig(iterations=9, warmup=0.5),
    omega=OmegaConfig(rule="uniform", groups=3),
    convention="tfmq",
    keep_float=("a.*", "b"),
    weight_steps=4,
    seed=11,
)


@pytest.mark.parametrize("config", [QuantConfig(), OTHER])
def test_a_config_survives_json(config: QuantConfig) -> None:
    assert parse_record(QuantConfig, json.dumps(to_json(config)), "plan.json", "Again") == config


def test_what_is_left_out_keeps_its_default() -> None:
    read = parse_record(QuantConfig, '{"weight": {"bits": 8}}', "plan.json", "Again")
    assert read == QuantConfig(weight=WeightConfig(bits=8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sed": 1}, "plan.json: sed is a field that this version does not know"),
        ({"weight": {"bit": 4}}, r"weight\.bit is a field that this version does not know"),
        ({"omega": {"rule": "gak"}}, r"omega\.rule is 'gak', expected 'uniform', "),
        ({"rounds": "1"}, "rounds is '1', expected a valid integer"),
        ({"weight": {"bits": 99}}, "weight bits = 99: choose a whole number from 2 to 8"),
    ],
)
def test_a_setting_that_is_unknown_or_wrong_is_named(data: dict, message: str) -> None:
    with pytest.raises(CalibError, match=message):
        parse_record(QuantConfig, json.dumps(data), "plan.json", "Again")


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 4.5])
def test_bits_outside_two_to_eight_are_refused(bits: float) -> None:
    with pytest.raises(CalibError, match=rf"weight bits = {bits}: choose a whole number from 2 to 8"):
        QuantConfig(weight=WeightConfig(bits=bits))
    with pytest.raises(CalibError, match=rf"activation bits = {bits}: choose a whole number from 2 to 8"):
        QuantConfig(activation=ActivationConfig(bits=bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_from_two_to_eight_are_taken(bits: int) -> None:
    assert QuantConfig(weight=WeightConfig(bits=bits), activation=ActivationConfig(bits=bits)).weight.bits == bits


def test_an_unknown_omega_rule_is_refused_by_name() -> None:
    with pytest.raises(CalibError, match=r"Unknown omega rule 'best'. Choose one of \['fish', 'gac', 'gac-exact', "):
        QuantConfig(omega=OmegaConfig(rule="best"))
    assert {QuantConfig(omega=OmegaConfig(rule=rule)).omega.rule for rule in OmegaRule} == {
        "uniform",
        "random",
        *omega.RULES,
    }


def test_an_unknown_softmax_or_rounding_start_is_refused_by_name() -> None:
    with pytest.raises(CalibError, match=r"Unknown omega softmax 'all'. Choose one of \['batch', 'set'\]"):
        QuantConfig(omega=OmegaConfig(softmax="all"))
    with pytest.raises(CalibError, match=r"Unknown rounding start 'up'. Choose one of \['float', 'gptq'\]"):
        QuantConfig(reconstruction=ReconstructionConfig(start="up"))


def test_an_unknown_activation_rule_is_refused_by_name() -> None:
    with pytest.raises(CalibError, match=r"Unknown activation rule 'max'. Choose one of \['ema', 'minmax'\]"):
        QuantConfig(activation=ActivationConfig(rule="max"))
    assert set(ranges.RULES) == set(RangeRule)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_files_cannot_hold_is_refused(seed: int) -> None:
    with pytest.raises(CalibError, match=f"Found the seed {seed}; give a whole number from 0 to 9223372036854775807"):
        QuantConfig(seed=seed)
    assert QuantConfig(seed=2**63 - 1).seed == 2**63 - 1


def test_less_than_no_learning_is_refused() -> None:
    with pytest.raises(CalibError, match=r"Found -1 iterations for a block; give 0 \(no learning\) or more"):
        ReconstructionConfig(iterations=-1)
