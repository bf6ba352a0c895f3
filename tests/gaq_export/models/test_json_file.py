from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.models.json_file import read_json


def test_the_object_in_a_file_is_returned(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"width": 8, "name": "\u00e9"}', encoding="utf-8")
    assert read_json(file, "model config") == {"width": 8, "name": "\u00e9"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no model config .*config.json"),
        (b"{", "The model config .*config.json cannot be read as JSON: "),
        (b"\xff", "The model config .*config.json cannot be read as JSON: "),
        (b"[1]", "The model config .*config.json must hold a JSON object, not a list"),
        (b"null", "not a NoneType"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(GaqError, match=message):
        read_json(file, "model config")
