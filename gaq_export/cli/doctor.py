"""What this machine can do with the engines, and what it would need to do more."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import engines
from engines.machine import Machine, look


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What was found.

    Attributes:
        machine: processor, GPUs, packages.
        backends: by name, why it cannot build and why it cannot run here, and what would help; None where it can.
        best: the backend that `build-engine` takes by itself; None if there is none.
    """

    machine: Machine
    backends: Mapping[str, tuple[str | None, str | None]]
    best: str | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        backends = {name: {"cannot_build": b, "cannot_run": r} for name, (b, r) in self.backends.items()}
        return {"machine": asdict(self.machine), "backends": backends, "best": self.best}


def checkup() -> Checkup:
    """Look at this machine."""
    backends = {name: (backend.can_build(), backend.can_run()) for name, backend in engines.BACKENDS.items()}
    best = next((name for name, problems in backends.items() if problems == (None, None)), None)
    return Checkup(machine=look(), backends=backends, best=best)
