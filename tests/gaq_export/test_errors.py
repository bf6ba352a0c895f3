"""Messages for names that are in no table."""

import pytest

from gaq_export.errors import GaqError, unknown, visible


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


def test_a_foreign_text_hides_nothing_and_stays_on_one_line() -> None:
    assert visible("a\n\tb  c") == "a b c"
    assert visible("\u202eevil\x1b[2J\udcff") == "\ufffdevil\ufffd[2J\ufffd"
    assert visible("Grüße, 絵, \U0001f600") == "Grüße, 絵, \U0001f600"
