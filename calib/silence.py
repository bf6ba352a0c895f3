"""Silence for warnings that libraries write for their developers, and that a user can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Hide all warnings, and the messages of `logger` below errors, while this is open.

    Args:
        logger: name of a library's logger, such as "torch".
    """
    noisy = logging.getLogger(logger)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
