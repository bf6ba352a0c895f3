"""What images are told to be: a table of rows, classes or texts, and which image is told which.

The image of seed s is told row s mod K of K, whoever draws it and however many are drawn. With guidance, a network is
called with twice as many samples: half of them are told what stands for nothing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gaq_export.denoiser import Condition, Denoiser
from gaq_export.errors import GaqError

Told = Callable[[Tensor, Tensor, Condition], Tensor]  # a network, called as (x, t, cond)
LABELS = "class_labels"
NOTHING, GUIDANCE = "nothing_", "guidance"  # what an engine with guidance calls its further inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """What to draw.

    Attributes:
        names: K of them, for people: a class's number, a text.
        rows: by the network's name for it, (K, ...) each.
        instead: what stands for nothing, (1, ...) each; empty if the network has no such thing.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    names: tuple[str, ...]
    rows: Condition
    instead: Condition
    guidance: float = 1.0

    def __post_init__(self) -> None:
        sizes = {name: len(row) for name, row in self.rows.items()}
        if not sizes or set(sizes.values()) != {len(self.names)} or not self.names:
            raise GaqError(f"Conditions need a row of everything for each of {len(self.names)} names; found {sizes}.")
        if self.guidance != 1 and self.instead.keys() != self.rows.keys():
            raise GaqError(f"Guidance of {self.guidance:g} needs what stands for nothing, for each of {sorted(sizes)}.")

    @property
    def guided(self) -> bool:
        """Whether every call has twice as many samples as images."""
        return self.guidance != 1

    @property
    def sha256(self) -> str:
        """Of everything that images depend on."""
        sha = hashlib.sha256(f"{self.guidance!r}".encode())
        for table in (self.rows, self.instead if self.guided else {}):
            for name in sorted(table):
                sha.update(f"{name}{tuple(table[name].shape)}".encode() + table[name].contiguous().numpy().tobytes())
        return sha.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; raise GaqError for rows of floats, which are too many to be written so."""
        if any(row.is_floating_point() for row in self.rows.values()):
            raise GaqError("Only classes can be written into a plan so far, no texts.")
        tables = ({name: row.tolist() for name, row in table.items()} for table in (self.rows, self.instead))
        return dict(zip(("names", "guidance", "rows", "instead"), (self.names, self.guidance, *tables), strict=True))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        rows, instead = (
            {name: torch.tensor(row, dtype=torch.int64) for name, row in record[table].items()}
            for table in ("rows", "instead")
        )
        return cls(names=tuple(record["names"]), rows=rows, instead=instead, guidance=record["guidance"])

    def name_of(self, seed: int) -> str:
        """Return what the image of a seed is told, for people."""
        return self.names[seed % len(self.names)]

    def of(self, seeds: Sequence[int]) -> Condition:
        """Return what a network is told for images of these seeds: (N, ...), with guidance (2N, ...), nothing first."""
        index = torch.tensor([seed % len(self.names) for seed in seeds])
        chosen = {name: row[index] for name, row in self.rows.items()}
        if not self.guided:
            return chosen
        return {name: torch.cat((self.instead[name].expand_as(row), row)) for name, row in chosen.items()}

    def feeds(self, seeds: Sequence[int]) -> Condition:
        """Return what an engine of steps is told for images of these seeds: (N, ...) each, and the scale, (1,)."""
        cond = self.of(seeds)
        if not self.guided:
            return cond
        halves = {name: row.chunk(2) for name, row in cond.items()}
        told = {name: half[1] for name, half in halves.items()}
        return told | {f"{NOTHING}{name}": half[0] for name, half in halves.items()} | {GUIDANCE: self.scale}

    @property
    def scale(self) -> Tensor:
        """The guidance, (1,) float32."""
        return torch.tensor([self.guidance], dtype=torch.float32)


def classes(chosen: Sequence[int], *, nothing: int | None = None, guidance: float = 1.0) -> Conditions:
    """Return classes to draw; `nothing` is the one that stands for none."""
    rows = {LABELS: torch.tensor(chosen, dtype=torch.int64)}
    instead = {} if nothing is None else {LABELS: torch.tensor([nothing])}
    return Conditions(names=tuple(map(str, chosen)), rows=rows, instead=instead, guidance=guidance)


def refuse(conditions: Conditions | None, what: str) -> None:
    """Raise GaqError if a network is told what to draw: `what` cannot do with that yet."""
    if conditions is not None:
        raise GaqError(f"The network is told what to draw, and {what} cannot do with that yet.")


class Guided(nn.Module):
    """A network with guidance (Ho and Salimans 2022), told what `Conditions.feeds` gives; as an engine of steps has it.

    epsilon = epsilon(nothing) + guidance * (epsilon(cond) - epsilon(nothing)), both in one call.
    """

    def __init__(self, network: Told) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        names = [name for name in told if f"{NOTHING}{name}" in told]
        both = {name: torch.cat((told[f"{NOTHING}{name}"], told[name])) for name in names}
        nothing, something = self.network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        return nothing + told[GUIDANCE][0] * (something - nothing)


def bind(network: Told, conditions: Conditions | None, seeds: Sequence[int]) -> Denoiser:
    """Return the network as one for images of these seeds, with guidance if there is any; as it is if told nothing."""
    if conditions is None:
        return network  # type: ignore[return-value]
    told = conditions.feeds(seeds)
    outer = Guided(network) if conditions.guided else network
    return lambda x, t, /: outer(x, t, told)
