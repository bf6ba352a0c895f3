"""The command that shows which backends build and run on this machine, and what the others need."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gaq_export.cli import terminal
from gaq_export.cli.options import one_line_errors

if TYPE_CHECKING:
    from engines.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a machine has, and what that allows.

    Attributes:
        machine: processor, GPUs, packages.
        backends: by name, why it cannot build and why it cannot run here, and what would help; None where it can.
        best: the backend that `build-engine` takes by default; None if no backend can both build and run.
        pytorch: its version, what --device auto takes, and why that is no CUDA GPU.
    """

    machine: "Machine"
    backends: Mapping[str, tuple[str | None, str | None]]
    best: str | None
    pytorch: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        backends = {name: {"cannot_build": build, "cannot_run": run} for name, (build, run) in self.backends.items()}
        notes = [gpu.advice for gpu in self.machine.gpus if gpu.advice]
        return {
            "machine": asdict(self.machine),
            "pytorch": self.pytorch,
            "notes": notes,
            "backends": backends,
            "best": self.best,
        }


def diagnose() -> Diagnosis:
    """Return what this machine has, and what each backend can do on it."""
    import engines
    from engines.machine import inspect_machine
    from gaq_export.devices import describe_torch

    backends = {name: (backend.can_build(), backend.can_run()) for name, backend in engines.BACKENDS.items()}
    # The table is in order of preference.
    best = next((name for name, problems in backends.items() if problems == (None, None)), None)
    return Diagnosis(machine=inspect_machine(), backends=backends, best=best, pytorch=describe_torch())


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what is installed, which backends can build and run here, and what the others lack."""
    with one_line_errors():
        diagnosis = diagnose()
        if as_json:
            typer.echo(json.dumps(diagnosis.to_json(), indent=1))
        else:
            terminal.print_diagnosis(diagnosis)
