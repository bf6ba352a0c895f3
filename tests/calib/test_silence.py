"""Silence: nothing gets through while it lasts, and everything is as before afterwards."""

import logging
import warnings

import pytest

from calib.silence import silenced


def test_warnings_and_notes_are_dropped_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a.library")
    with warnings.catch_warnings(record=True) as caught, silenced("a.library"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logger.warning("a note")
        logger.error("a fault")
    assert not caught
    assert [record.message for record in caplog.records] == ["a fault"]


def test_levels_come_back_even_after_an_error() -> None:
    logger = logging.getLogger("another.library")
    logger.setLevel(logging.INFO)
    with pytest.raises(ValueError, match="inside"), silenced("another.library"):
        raise ValueError("inside")
    assert logger.level == logging.INFO
