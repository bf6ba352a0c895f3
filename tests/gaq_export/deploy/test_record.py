"""The engine record: what is written is what is read, and anything else is refused in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.correction import Correction
from calib.errors import CalibError
from engines import Audit, EngineFile
from gaq_export.deploy.record import (
    EngineRecord,
    GraphKind,
    LinkedFile,
    Numbers,
    PlanLink,
    Switching,
    TextEncoders,
    link,
    parse_choice,
    record_of,
)
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.provenance import Provenance
from tests.gaq_export.networks import Own, wrapped

OTHER = LinkedFile(file="unet-a4.plan", sha256="1" * 64)


@pytest.fixture
def record() -> EngineRecord:
    model = wrapped(Own())
    correction = Correction(
        rule="ptqd", gain=((0.5,),), bias=((0.25,),), shift=((0.0,),), variance=(0.1,), explained=(0.9,)
    )
    return EngineRecord(
        provenance=Provenance.of(model, SamplerSpec(steps=1)),
        graph=GraphKind.STEP,
        bits="W4A4/8",
        numbers=Numbers.FP8,
        plan=PlanLink(sha256="2" * 64, layers=3),
        correction=correction,
        tables=("time.0", "time.1"),
        switching=Switching(engines=(OTHER,), turns=(1,)),
        decoder=LinkedFile(file="unet-decoder.plan", sha256="3" * 64),
        text_encoders=TextEncoders(engines=(OTHER,), tokenizers=(OTHER,), zeros=True, time_ids=[[1.0, 2.0]]),
    )


def file_with(metadata: dict[str, object]) -> EngineFile:
    return EngineFile(
        path=Path("unet.plan"),
        backend="openvino",
        inputs=(),
        outputs=(),
        batch=(1, 1, 1),
        sha256="4" * 64,
        audit=Audit(kernels=(), weight_bytes={}, note=""),
        build_seconds=0.0,
        metadata=metadata,
    )


def test_a_record_with_everything_in_it_survives_json(record: EngineRecord) -> None:
    read = record_of(file_with(record.to_json()))
    assert read.to_json() == record.to_json()
    assert (read.switching, read.decoder, read.text_encoders) == (
        record.switching,
        record.decoder,
        record.text_encoders,
    )
    assert (read.correction, read.plan, read.tables) == (record.correction, record.plan, record.tables)
    assert read.whole_steps


def test_a_record_with_nothing_optional_in_it_survives_json(record: EngineRecord) -> None:
    plain = EngineRecord(provenance=record.provenance, graph=GraphKind.EPS, bits="float")
    read = record_of(file_with(plain.to_json()))
    assert read.to_json() == plain.to_json()
    assert (read.plan, read.correction, read.switching, read.decoder, read.text_encoders) == (None,) * 5
    assert not read.whole_steps


def test_a_record_of_another_format_or_with_a_part_missing_is_refused(record: EngineRecord) -> None:
    fields = record.to_json()
    with pytest.raises(GaqError, match=r"unet.plan has format 0; this version reads 1\. Build the engine again"):
        record_of(file_with(fields | {"format": 0}))
    with pytest.raises(GaqError, match="has format None"):
        record_of(file_with({}))
    for name in fields.keys() - {"format"}:
        with pytest.raises(CalibError, match=rf"unet\.plan: {name} is missing\. Build the engine again"):
            record_of(file_with({part: value for part, value in fields.items() if part != name}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "whole"}, "graph is 'whole', expected 'step' or 'eps'"),
        ({"numbers": None}, "numbers is None, expected 'int8' or 'fp8'"),
        ({"bits": 4}, "bits is 4, expected a valid string"),
        ({"plan": {"sha256": "x", "layers": 3}}, "plan.sha256 is 'x', expected"),
        ({"plan": []}, r"plan is \[\], expected"),
        ({"tables": [None]}, "tables.0 is None, expected"),
        ({"decoder": {"file": "x"}}, "decoder.sha256 is missing"),
        ({"text_encoders": {"engines": 3}}, "text_encoders.engines is 3, expected"),
        ({"switching": {"engines": [], "turns": [7]}}, "switching does not name one of the engines for each of"),
        ({"switching": {"engines": [], "turns": []}}, "switching.turns is "),
        ({"provenance": {}}, "The record of the float model: model is missing"),
        ({"colour": 1}, "colour is a field that this version does not know"),
    ],
)
def test_a_part_of_another_kind_is_one_line(change: dict[str, Any], message: str, record: EngineRecord) -> None:
    with pytest.raises((CalibError, GaqError), match=message) as error:
        record_of(file_with(record.to_json() | change))
    assert "\n" not in str(error.value)


def test_a_correction_of_other_steps_is_one_line(record: EngineRecord) -> None:
    fields = record.to_json()
    tables = ("gain", "bias", "shift", "variance", "explained")
    longer = {table: [*fields["correction"][table], fields["correction"][table][0]] for table in tables}
    with pytest.raises(GaqError, match="correction is not for 1 steps and 1 channels"):
        record_of(file_with(fields | {"correction": fields["correction"] | longer}))


def test_an_engine_is_named_by_its_file_and_checksum() -> None:
    file = replace(file_with({}), path=Path("somewhere/unet.plan"))
    assert link(file) == LinkedFile(file="unet.plan", sha256="4" * 64)


def test_a_choice_is_read_by_its_value_and_a_wrong_one_names_all() -> None:
    assert parse_choice("graph", "eps", GraphKind) is GraphKind.EPS
    with pytest.raises(GaqError, match=r"Unknown graph 'epx'\. Did you mean 'eps'\? Choose one of \['step', 'eps'\]"):
        parse_choice("graph", "epx", GraphKind)
