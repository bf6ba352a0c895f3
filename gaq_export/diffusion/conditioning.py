"""What images are told to be: a table of rows, classes or texts, and which image is told which.

The image of seed s is told row s mod K of K, whoever draws it and however many are drawn. With guidance, a network is
called with twice as many samples: half of them are told what stands for nothing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from calib.files import read_safetensors, write_atomically
from gaq_export.diffusion.denoiser import Condition, Denoiser
from gaq_export.errors import GaqError

ConditionalNetwork = Callable[..., Tensor]  # a network, called as (x, t, cond), or (x, t) if it is told nothing
LABELS = "class_labels"
TABLES = ("rows", "unconditional")
UNCONDITIONAL, GUIDANCE = "unconditional_", "guidance"  # what an engine with guidance calls its further inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """What to draw.

    Attributes:
        names: K of them, for people: a class's number, a text.
        rows: by the network's name for it, (K, ...) each.
        instead: what stands for nothing, (1, ...) each; empty if the network has no such thing.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    names: tuple[str, ...]
    rows: Condition
    unconditional: Condition
    guidance: float = 1.0

    def __post_init__(self) -> None:
        sizes = {name: len(row) for name, row in self.rows.items()}
        if not sizes or set(sizes.values()) != {len(self.names)} or not self.names:
            raise GaqError(f"Conditions need a row of everything for each of {len(self.names)} names; found {sizes}.")
        if self.guidance != 1 and self.unconditional.keys() != self.rows.keys():
            raise GaqError(f"Guidance of {self.guidance:g} needs what stands for nothing, for each of {sorted(sizes)}.")

    @property
    def guided(self) -> bool:
        """Whether every call has twice as many samples as images."""
        return self.guidance != 1

    @property
    def sha256(self) -> str:
        """Of everything that images depend on."""
        sha = hashlib.sha256(f"{self.guidance!r}".encode())
        for table in (self.rows, self.unconditional if self.guided else {}):
            for name in sorted(table):
                sha.update(f"{name}{tuple(table[name].shape)}".encode() + table[name].contiguous().numpy().tobytes())
        return sha.hexdigest()

    @property
    def file(self) -> str | None:
        """What the file is called that `save` writes; None if a record has room for all of it, as for classes."""
        texts = any(row.is_floating_point() for row in self.rows.values())
        return f"conditioning-{self.sha256[:12]}.safetensors" if texts else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the rows among them unless they are in a file."""
        record: dict[str, Any] = {"names": list(self.names), "guidance": self.guidance, "file": self.file}
        if self.file is None:
            record |= {table: {n: row.tolist() for n, row in getattr(self, table).items()} for table in TABLES}
        return record

    def save(self, folder: Path) -> None:
        """Write the rows that a record has no room for into the folder where the record is, if there are any."""
        if self.file is not None:
            tables = {f"{table}/{n}": row.contiguous() for table in TABLES for n, row in getattr(self, table).items()}
            write_atomically(folder / self.file, save(tables))

    @classmethod
    def from_json(cls, record: Mapping[str, Any], folder: Path) -> Self:
        """Read what `to_json` wrote, and `save` into a folder.

        Raises:
            CalibError: the file is missing or damaged.
            GaqError: it is another one.
        """
        if record["file"] is None:
            tables = {table: {n: torch.tensor(row) for n, row in record[table].items()} for table in TABLES}
        else:
            _, tensors = read_safetensors(folder / record["file"])
            tables = {table: {} for table in TABLES}
            for name, row in tensors.items():
                table, _, own = name.partition("/")
                tables[table][own] = row
        found = cls(names=tuple(record["names"]), guidance=record["guidance"], **tables)
        if found.file != record["file"]:
            raise GaqError(f"{folder / record['file']} was altered since it was written: calibrate and build again.")
        return found

    def name_of(self, seed: int) -> str:
        """Return what the image of a seed is told, for people."""
        return self.names[seed % len(self.names)]

    def of(self, seeds: Sequence[int]) -> Condition:
        """Return what a network is told for images of these seeds: (N, ...), with guidance (2N, ...), nothing first."""
        index = self._rows_of(seeds)
        chosen = {name: row[index] for name, row in self.rows.items()}
        if not self.guided:
            return chosen
        return {name: torch.cat((self.unconditional[name].expand_as(row), row)) for name, row in chosen.items()}

    def feeds(self, seeds: Sequence[int]) -> Condition:
        """Return what an engine of steps is told for images of these seeds: (N, ...) each, and the scale, (1,).

        What stands for nothing is there if it is known, also with a scale of 1.
        """
        index = self._rows_of(seeds)
        condition = {name: row[index] for name, row in self.rows.items()}
        if not self.unconditional:
            return condition
        unconditional = {
            f"{UNCONDITIONAL}{name}": self.unconditional[name].expand_as(row) for name, row in condition.items()
        }
        return condition | unconditional | {GUIDANCE: self.scale}

    def _rows_of(self, seeds: Sequence[int]) -> Tensor:
        return torch.tensor([seed % len(self.names) for seed in seeds])

    @property
    def scale(self) -> Tensor:
        """The guidance, (1,) float32."""
        return torch.tensor([self.guidance], dtype=torch.float32)


def class_conditioning(
    chosen: Sequence[int], *, unconditional: int | None = None, guidance: float = 1.0
) -> Conditioning:
    """Return conditioning on classes; `unconditional` is the label that stands for no class."""
    rows = {LABELS: torch.tensor(chosen, dtype=torch.int64)}
    null = {} if unconditional is None else {LABELS: torch.tensor([unconditional])}
    return Conditioning(names=tuple(map(str, chosen)), rows=rows, unconditional=null, guidance=guidance)


class Guided(nn.Module):
    """A network with guidance (Ho and Salimans 2022), told what `Conditions.feeds` gives; as an engine of steps has it.

    epsilon = epsilon(nothing) + guidance * (epsilon(cond) - epsilon(nothing))

    Args:
        network: called with both in one batch.
        apart: called for one after the other instead, since an engine's batch has an end.
    """

    def __init__(self, network: ConditionalNetwork, *, apart: bool = False) -> None:
        super().__init__()
        self.network, self.apart = network, apart

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        names = [name for name in condition if f"{UNCONDITIONAL}{name}" in condition]
        cond, without = (
            {name: condition[name] for name in names},
            {name: condition[f"{UNCONDITIONAL}{name}"] for name in names},
        )
        if self.apart:
            unconditional, something = self.network(x, t, without), self.network(x, t, cond)
        else:
            both = {name: torch.cat((without[name], cond[name])) for name in names}
            unconditional, something = self.network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        return unconditional + condition[GUIDANCE][0] * (something - unconditional)


def bind(
    network: ConditionalNetwork, conditioning: Conditioning | None, seeds: Sequence[int], *, apart: bool = False
) -> Denoiser:
    """Return the network as one for images of these seeds, with guidance if there is any; as it is if told nothing.

    With `apart` it is called twice for guidance, see `Guided`.
    """
    if conditioning is None:
        return network
    guided = conditioning.guided
    condition = conditioning.feeds(seeds) if guided else conditioning.of(seeds)
    outer = Guided(network, apart=apart) if guided else network
    return lambda x, t, /: outer(x, t, condition)
