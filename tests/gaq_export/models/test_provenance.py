"""What a plan records about its float model leads back to that model and to no other."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calib.errors import CalibError
from gaq_export.diffusion.conditioning import class_conditioning
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel, load_model, wrap
from gaq_export.models.provenance import Provenance, find_model, load_conditioning
from gaq_export.models.source import WeightSource
from tests.gaq_export.networks import Own

SPEC = SamplerSpec(name="ddpm", steps=7, spacing="quad")


@pytest.fixture
def conditioned() -> LoadedModel:
    schedule = replace(linear_schedule(num_train=10, clip=2.0), last=0.9)
    conditioning = class_conditioning((1, 4), unconditional=9, guidance=2.0)
    return wrap(Own(), shape=(1, 8, 6), schedule=schedule, conditioning=conditioning)


def test_a_provenance_survives_json_to_the_bit(conditioned: LoadedModel, tmp_path: Path) -> None:
    made = Provenance.of(conditioned, SPEC)
    read = Provenance.from_json(made.to_json())
    assert read.to_json() == made.to_json()
    assert torch.equal(read.schedule.alpha_bar, conditioned.schedule.alpha_bar)
    assert (read.schedule.clip, read.schedule.last, read.sampler, read.shape) == (2.0, 0.9, SPEC, (1, 8, 6))
    conditioning = load_conditioning(read, tmp_path)
    assert conditioning is not None
    assert conditioning.sha256 == conditioned.conditioning.sha256


def test_an_incomplete_or_unknown_record_is_refused(conditioned: LoadedModel) -> None:
    fields = Provenance.of(conditioned, SPEC).to_json()
    with pytest.raises(CalibError, match="The record of the float model: conditions is a field that this version does"):
        Provenance.from_json(fields | {"conditions": {}})
    for name in ("model", "architecture", "sampler", "schedule"):
        with pytest.raises(CalibError, match=rf"model: {name} is missing.*\. Calibrate and build again"):
            Provenance.from_json({part: value for part, value in fields.items() if part != name})


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("model", {"shape": [1, 8]}),
        ("model", {"shape": [1, 8, 10**9]}),
        ("model", {"shape": [1, -8, 6]}),
        ("model", {"source": "a\0b"}),
        ("model", {"source": None}),
        ("model", {"classes": -1}),
        ("model", {"meaningless": "no"}),
        ("sampler", {"steps": 10**9}),
        ("sampler", {"steps": 0}),
        ("sampler", {"steps": "5"}),
        ("sampler", {"eta": math.nan}),
        ("sampler", {"name": ["ddim"]}),
        ("schedule", {"alpha_bar": []}),
        ("schedule", {"alpha_bar": [0.5, math.nan]}),
        ("schedule", {"alpha_bar": [0.5, "x"]}),
        ("schedule", {"alpha_bar": [0.5, 0.6]}),
        ("schedule", {"clip": -1.0}),
        ("schedule", {"last": 7.0}),
    ],
)
def test_a_part_out_of_range_is_one_line(part: str, changes: dict[str, object], conditioned: LoadedModel) -> None:
    fields = Provenance.of(conditioned, SPEC).to_json()
    with pytest.raises((CalibError, GaqError)) as error:
        Provenance.from_json(fields | {part: fields[part] | changes})
    assert "\n" not in str(error.value)


def test_a_class_that_the_model_does_not_have_is_one_line(conditioned: LoadedModel, tmp_path: Path) -> None:
    recorded = replace(Provenance.of(conditioned, SPEC), classes=4)
    with pytest.raises(GaqError, match="names a class beyond 3"):
        load_conditioning(recorded, tmp_path)


def test_a_module_of_the_callers_has_to_be_given_and_has_to_be_the_same(
    conditioned: LoadedModel, tmp_path: Path
) -> None:
    recorded = Provenance.of(conditioned, SPEC)
    with pytest.raises(GaqError, match=r"is a module of your own: call this from Python with model=wrap\(\.\.\.\)"):
        find_model(recorded, None, tmp_path)
    plain = replace(conditioned, conditioning=None)
    assert find_model(recorded, plain, tmp_path).conditioning.names == ("1", "4")
    other = wrap(Own(seed=1), shape=(1, 8, 6), schedule=conditioned.schedule)
    with pytest.raises(GaqError, match="This plan belongs to another model"):
        find_model(recorded, other, tmp_path)


def test_a_named_model_is_loaded_again_from_where_it_was(tmp_path: Path) -> None:
    model = load_model("ddpm-mnist")
    recorded = Provenance.from_json(Provenance.of(model, model.spec.sampler).to_json())
    assert find_model(recorded, None, tmp_path).fingerprint == model.fingerprint
    moved = recorded.moved_to(WeightSource.parse("random:3"))
    assert (str(moved.source), moved.fingerprint) == ("random:3", recorded.fingerprint)
    with pytest.raises(GaqError, match="This plan belongs to another model"):
        find_model(moved, None, tmp_path)


def test_a_modules_config_says_its_channels_and_size(conditioned: LoadedModel) -> None:
    config = Provenance.of(conditioned, SPEC).network_config
    assert (config["in_channels"], config["out_channels"]) == (1, 1)
    assert list(config["sample_size"]) == [8, 6]
