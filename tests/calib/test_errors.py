"""A name that is in no table: the error lists the table and asks for the nearest."""

import pytest

from calib.errors import CalibError, did_you_mean, unknown


@pytest.mark.parametrize(
    ("name", "question"), [("emma", " Did you mean 'ema'?"), ("minmx", " Did you mean 'minmax'?"), ("xyz", "")]
)
def test_the_nearest_name_is_asked_for_where_there_is_one(name: str, question: str) -> None:
    error = unknown("rule", name, ["ema", "minmax"])
    assert isinstance(error, CalibError)
    assert str(error) == f"Unknown rule {name!r}. Choose one of ['ema', 'minmax'].{question}"


def test_a_stricter_cutoff_asks_for_fewer_names() -> None:
    assert did_you_mean("emma", ["ema"]) == " Did you mean 'ema'?"
    assert did_you_mean("emma", ["ema"], cutoff=0.9) == ""
