"""Silence for warnings that libraries write for their developers, and that a user can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(logger: str, below: int = logging.ERROR) -> Iterator[None]:
    """Hide all warnings, and the messages of `logger` that are not errors, while this is open.

    Args:
        logger: name of a library's logger, such as "torch".
        below: level of the messages that are not hidden; `logging.CRITICAL` hides errors too, where they are expected.
    """
    noisy = logging.getLogger(logger)
    level = noisy.level
    noisy.setLevel(below)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
