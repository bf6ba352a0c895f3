"""The one error class of this room: everything a user can cause arrives as an `EngineError` of one line."""


class EngineError(Exception):
    """Say what was found, what was expected and what to do, in one line."""
