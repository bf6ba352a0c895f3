from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import pytest
from pydantic import Field

import calib.records
import engines.records
from calib.errors import CalibError
from engines.errors import EngineError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Part:
    bits: Annotated[int, Field(ge=2, le=8)]
    codes: tuple[int, ...] = ()
    scale: calib.records.Positive = 1.0
    colour: Colour = Colour.RED


LINES = [
    ('{"a": {"bits": 99}}', "a.bits is 99, expected less than or equal to 8"),
    ('{"a": {"bits": "4"}}', "a.bits is '4', expected a valid integer"),
    ('{"a": {"bits": true}}', "a.bits is True, expected a valid integer"),
    ('{"a": {"bits": 4, "scale": NaN}}', "a.scale is nan, expected a finite number"),
    ('{"a": {"bits": 4, "scale": 0}}', "a.scale is 0, expected greater than 0"),
    ('{"a": {"bits": 4, "codes": [1, 2.5]}}', "a.codes.1 is 2.5, expected a valid integer"),
    ('{"a": {"bits": 4, "colour": "green"}}', "a.colour is 'green', expected 'red' or 'blue'"),
    ('{"a": {}}', "a.bits is missing"),
    ('{"a": {"bits": 4, "odd": 1}}', "a.odd is a field that this version does not know"),
    ('{"a": [1]}', "a is [1], expected an object"),
    ('{"a": {"bits": "4", "odd": 1}}', "a.bits is '4', expected a valid integer (and 1 more)"),
    ("3", "the record is 3, expected an object"),
    ("[" * 100_000, "invalid JSON: recursion limit exceeded at line 1 column 202"),
    ("", "invalid JSON: EOF while parsing a value at line 1 column 0"),
    (b"\xff\xfe", "invalid JSON: expected value at line 1 column 1"),
]


@pytest.mark.parametrize(
    ("parse", "error"),
    [(calib.records.parse_record, CalibError), (engines.records.parse_record, EngineError)],
    ids=["calib", "engines"],
)
@pytest.mark.parametrize(("text", "line"), LINES)
def test_a_record_of_the_wrong_form_is_one_line(text: Any, line: str, parse: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        parse(dict[str, Part], text, "plan.json", "Calibrate again")

    assert str(caught.value) == f"plan.json: {line}. Calibrate again."


def test_a_record_is_read_with_arrays_as_tuples_and_names_as_members() -> None:
    text = '{"a": {"bits": 4, "codes": [1, 2], "scale": 2, "colour": "blue"}}'

    record = calib.records.parse_record(dict[str, Part], text, "plan.json", "Calibrate again")

    assert record == {"a": Part(bits=4, codes=(1, 2), scale=2.0, colour=Colour.BLUE)}
    assert calib.records.check_record(Part, {"bits": 4}, "here", "Again") == Part(bits=4)
