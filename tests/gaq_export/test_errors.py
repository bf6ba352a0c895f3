"""Messages for names that are in no table."""

import pytest

from gaq_export.errors import GaqError, unknown


@pytest.mark.parametrize(
    ("name", "hint", "message"),
    [
        ("rde", "", "Unknown colour 'rde'. Did you mean 'red'? Choose one of ['red', 'green']."),
        ("violet", "", "Unknown colour 'violet'. Choose one of ['red', 'green']."),
        ("violet", "Or mix one.", "Unknown colour 'violet'. Choose one of ['red', 'green']. Or mix one."),
        (7, "", "Unknown colour 7. Choose one of ['red', 'green']."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_choices(name: object, hint: str, message: str) -> None:
    error = unknown("colour", name, {"red": 1, "green": 2}, hint)
    assert isinstance(error, GaqError)
    assert str(error) == message
