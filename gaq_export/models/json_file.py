"""Read one of the JSON files beside weights: configs of networks, schedulers, decoders and text encoders.

They are other programs' files, so fields that are not known here are left alone.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from calib.records import complaint
from gaq_export.errors import GaqError, one_line

Record = TypeVar("Record")


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        file: The file.
        what: What it is called in messages, such as "scheduler config".

    Raises:
        GaqError: If it is missing, no JSON, or JSON of another kind.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GaqError(f"There is no {what} {file}.") from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise GaqError(f"The {what} {file} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise GaqError(f"The {what} {file} must hold a JSON object, not a {type(fields).__name__}.")
    return fields


def read_record(kind: type[Record], file: Path, what: str) -> Record:
    """Return the fields of a JSON file that a dataclass has, checked by their types; raise GaqError as `read_json`."""
    return checked(kind, read_json(file, what), f"The {what} {file}")


def checked(kind: type[Record], fields: dict[str, Any], where: str) -> Record:
    """Return those of a config's fields that a dataclass has; raise GaqError, naming `where`, if one is wrong."""
    try:
        # From JSON and not from the dictionary, which pydantic's strict mode takes for no dataclass.
        return TypeAdapter(kind).validate_json(json.dumps(fields), strict=True, extra="ignore")
    except ValidationError as error:
        raise GaqError(f"{where} is not valid: {complaint(error)}. Copy it again, or correct it.") from None
