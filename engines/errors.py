"""The one error class of this package: every mistake a user can make arrives as an `EngineError` of one line."""


class EngineError(Exception):
    """The message says in one line what was seen, what was expected and what to do."""
