"""Read one of the JSON files beside weights: configs of networks, schedulers, decoders and text encoders."""

import json
from pathlib import Path
from typing import Any

from gaq_export.errors import GaqError


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
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise GaqError(f"The {what} {file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise GaqError(f"The {what} {file} must hold a JSON object, not a {type(fields).__name__}.")
    return fields
