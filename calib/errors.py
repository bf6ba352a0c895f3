"""The one error that `calib` raises for anything a caller can cause."""


class CalibError(Exception):
    """Say what was found, what was expected and what to do, in one line."""
