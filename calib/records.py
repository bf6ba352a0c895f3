"""Read a JSON record into a frozen dataclass, or say in one line which field of it is wrong.

The fields' types are the schema, ranges included, as pydantic reads them from a plain dataclass; nothing is converted,
so that "3" or true never passes for 3. `engines.records` is the same for that package's errors.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from calib.errors import CalibError

Record = TypeVar("Record")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # that may name a file
Finite = Annotated[float, Field(allow_inf_nan=False)]
CHECKSUM = "record_sha256"  # its key in records that this program keeps for itself
_adapters: dict[Any, TypeAdapter[Any]] = {}
_log = logging.getLogger(__name__)


def parse_record(kind: type[Record], text: bytes | str, where: object, advice: str, *, others: bool = False) -> Record:
    """Read JSON as a `kind`: every key, no other, and values of exactly its fields' types.

    Args:
        kind: a dataclass, or a container of them such as `dict[str, Grid]`.
        text: the JSON.
        where: the file, or another name for the text in messages.
        advice: what to do about a bad record, a sentence without its full stop.
        others: whether the record may have other keys too, which are ignored.

    Raises:
        CalibError: it is no JSON, nested too deeply, or has a field that is missing, unknown or of another kind.
    """
    try:
        record: Record = _adapter(kind).validate_json(text, strict=True, extra="ignore" if others else "forbid")
    except ValidationError as error:
        raise CalibError(f"{where}: {complaint(error)}. {advice}.") from None
    except CalibError as error:  # of a dataclass that checks what its fields' types cannot say
        raise CalibError(f"{where}: {error} {advice}.") from None
    return record


def _adapter(kind: Any) -> TypeAdapter[Any]:
    # Making one takes milliseconds for a large record, and some records are read again and again.
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def read_record(kind: type[Record], path: Path, advice: str, *, others: bool = False) -> Record:
    """Do as `parse_record` with a file; raise CalibError also if it cannot be read."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CalibError(f"Cannot read {path}: {error.strerror}. {advice}.") from None
    return parse_record(kind, text, path, advice, others=others)


def signed(fields: Mapping[str, Any]) -> bytes:
    """Return a record as JSON with a checksum, for `read_kept_record`."""
    return json.dumps({**fields, CHECKSUM: _digest(fields)}, indent=1).encode()


def read_signed(kind: type[Record], path: Path, advice: str, *, others: bool = False) -> Record:
    """Do as `read_record` with a record that `signed` made; raise CalibError also if its checksum differs."""
    fields = read_record(dict[str, Any], path, advice)
    if fields.pop(CHECKSUM, None) != _digest(fields):
        raise CalibError(f"{path} was edited since it was written (its checksum differs). {advice}.")
    return check_record(kind, fields, path, advice, others=others)


def read_kept_record(kind: type[Record], path: Path) -> Record | None:
    """Return a record that `signed` made and this program keeps for itself.

    None means that it has to be made (again): it is not there, was altered, or is of another version. The log says so.
    """
    if not path.exists():
        return None
    try:
        return read_signed(kind, path, "It is made again")
    except CalibError:
        _log.warning("%s is damaged, altered or of another version: it is made again.", path)
        return None


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


def check_record(kind: type[Record], value: Any, where: object, advice: str, *, others: bool = False) -> Record:
    """Do as `parse_record` with JSON that was parsed already, as an object inside another record."""
    return parse_record(kind, _dumped(value), where, advice, others=others)


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


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
