"""The error `gaq_export` raises for anything a user can cause, and the family the command line prints in one line."""


class GaqError(Exception):
    """Say what was found, what was expected and what to do, in one line."""


def user_errors() -> tuple[type[Exception], ...]:
    """Collect the error classes that a command turns into one line instead of a traceback.

    A function and not a constant: importing `calib` loads torch, which `--help` must not wait for. Call it when a
    command has already failed.

    Returns:
        The error class of each room.
    """
    from calib.errors import CalibError
    from engines.errors import EngineError

    return (GaqError, CalibError, EngineError)
