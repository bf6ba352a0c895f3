"""The one error that `calib` raises for anything a caller can cause."""

from collections.abc import Sequence
from difflib import get_close_matches


class CalibError(Exception):
    """One line that says what was seen, what was expected and what to do."""


def unknown(what: str, name: str, known: Sequence[str]) -> CalibError:
    """Return the error for a name that is none of those known, with a list of those and a hint at the nearest.

    >>> str(unknown("rule", "emma", ["ema", "minmax"]))
    "Unknown rule 'emma'. Choose one of ['ema', 'minmax']. Did you mean 'ema'?"

    Args:
        what: what is being named.
        name: what the caller said.
        known: the names there are, in the order to list them in.
    """
    return CalibError(f"Unknown {what} {name!r}. Choose one of {list(known)}.{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Return a space and the question whether the nearest of the `known` names was meant; "" if none is near.

    Args:
        name: what the caller said.
        known: the names there are.
        cutoff: how alike the two must be, from 0 (anything) to 1 (equal); see `difflib.get_close_matches`.
    """
    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
