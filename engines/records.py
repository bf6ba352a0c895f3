"""Read a JSON record into a frozen dataclass, or say in one line which field of it is wrong.

The fields' types are the schema, ranges included, as pydantic reads them from a plain dataclass; nothing is converted,
so that "3" or true never passes for 3. `calib.records` is the same for that package's errors.
"""

from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from engines.errors import EngineError

Record = TypeVar("Record")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=1 << 31)]


def _dtype_name(name: str) -> str:
    try:
        np.dtype(name)
    except TypeError:  # among others for a name such as "float31"
        raise ValueError("a type of NumPy's such as float32") from None
    return name


DtypeName = Annotated[str, AfterValidator(_dtype_name)]


def parse_record(kind: type[Record], text: bytes | str, where: object, advice: str) -> Record:
    """Read JSON as a `kind`: every key, no other, and values of exactly its fields' types.

    Args:
        kind: a dataclass, or a container of them such as `dict[str, TensorSpec]`.
        text: the JSON.
        where: the file, or another name for the text in messages.
        advice: what to do about a bad record, a sentence without its full stop.

    Raises:
        EngineError: it is no JSON, nested too deeply, or has a field that is missing, unknown or of another kind.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise EngineError(f"{where}: {complaint(error)}. {advice}.") from None


def complaint(error: ValidationError) -> str:
    """Return pydantic's first complaint as a clause: the field, what was found there, what was expected.

    >>> try:
    ...     TypeAdapter(dict[str, int]).validate_json('{"steps": "x"}', strict=True)
    ... except ValidationError as error:
    ...     complaint(error)
    "steps is 'x', expected a valid integer"
    """
    first, *others = error.errors(include_url=False, include_context=False)
    field = ".".join(str(part) for part in first["loc"]) or "the record"
    more = f" (and {len(others)} more)" if others else ""
    match first["type"]:
        case "json_invalid":
            return first["msg"][:1].lower() + first["msg"][1:]
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{field} is missing{more}"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{field} is a field that this version does not know{more}"
    found = repr(first["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    return f"{field} is {found}, expected {_expectation(first['msg'])}{more}"


def _expectation(message: str) -> str:
    for prefix in ("Input should be ", "Value error, ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    return message
