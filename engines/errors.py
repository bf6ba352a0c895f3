"""The one error class of this package: every mistake a user can make arrives as an `EngineError` of one line.

What is worth knowing and stops nothing is an `EngineWarning`, of one line too.
"""


class EngineError(Exception):
    """The message says in one line what was seen, what was expected and what to do."""


class EngineWarning(UserWarning):
    """What a user should know of an engine that works all the same."""
