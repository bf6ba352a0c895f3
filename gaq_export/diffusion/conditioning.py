"""Conditioning: a table of classes or prompts, and which image gets which.

The image of seed s gets row s mod K of K, whoever draws it and however many are drawn. With guidance, a network is
called with twice as many samples, half of them with the unconditional condition.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from calib.errors import CalibError
from calib.files import read_safetensors, write_checked
from calib.records import Finite, check_record
from gaq_export.diffusion.denoiser import Condition, Denoiser
from gaq_export.errors import GaqError
from gaq_export.folders import inside

ConditionalNetwork = Callable[..., Tensor]  # called as (x, t, cond), or as (x, t) if it is unconditional
LABELS = "class_labels"
_ADVICE = "Calibrate and build again"
_Label = Annotated[int, Field(ge=0, le=1 << 31)]
TABLES = ("rows", "unconditional")
UNCONDITIONAL, GUIDANCE = "unconditional_", "guidance"  # names of the further inputs of an engine with guidance


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """What to draw.

    Attributes:
        names: K names to show: a class's number, a prompt.
        rows: tensors by the network's name for the input, (K, ...) each.
        unconditional: the unconditional condition, (1, ...) each; empty if the network has none.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    names: tuple[str, ...]
    rows: Condition
    unconditional: Condition
    guidance: float = 1.0

    def __post_init__(self) -> None:
        sizes = {name: len(row) for name, row in self.rows.items()}
        if not sizes or set(sizes.values()) != {len(self.names)} or not self.names:
            raise GaqError(
                f"Conditioning needs a row of every input for each of {len(self.names)} names; found {sizes}."
            )
        if self.guidance != 1 and self.unconditional.keys() != self.rows.keys():
            raise GaqError(
                f"Guidance of {self.guidance:g} needs the unconditional condition for each of {sorted(sizes)}."
            )

    @property
    def guided(self) -> bool:
        """Whether every call has twice as many samples as images."""
        return self.guidance != 1

    @property
    def sha256(self) -> str:
        """sha256, in hex, of everything that images depend on."""
        sha = hashlib.sha256(f"{self.guidance!r}".encode())
        # Without guidance the unconditional rows are not drawn with.
        for table in (self.rows, self.unconditional if self.guided else {}):
            for name in sorted(table):
                # With the shape, because tables of different shapes can have the same bytes.
                sha.update(f"{name}{tuple(table[name].shape)}".encode() + table[name].contiguous().numpy().tobytes())
        return sha.hexdigest()

    @property
    def file(self) -> str | None:
        """Name of the file that `save` writes; None where the record itself holds the rows, as for classes."""
        texts = any(row.is_floating_point() for row in self.rows.values())  # labels are integers
        # The name holds the hash of the content, so `from_json` notices a file that was altered.
        return f"conditioning-{self.sha256[:12]}.safetensors" if texts else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; rows of floats, which are large, go to a file, see `save`."""
        record: dict[str, Any] = {"names": list(self.names), "guidance": self.guidance, "file": self.file}
        if self.file is None:
            record |= {table: {n: row.tolist() for n, row in getattr(self, table).items()} for table in TABLES}
        return record

    def save(self, folder: Path) -> None:
        """Write the rows that are too large for the record into its folder, if there are any."""
        if self.file is not None:
            tables = {f"{table}/{n}": row for table in TABLES for n, row in getattr(self, table).items()}
            write_checked(folder / self.file, tables)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], folder: Path) -> Self:
        """Read what `to_json` returned, and the file that `save` wrote into a folder.

        Raises:
            CalibError: the record is incomplete, or the file is missing or damaged.
            GaqError: the file is not the one that the record was written with, or lies elsewhere.
        """
        read = check_record(_Record, record, "The record of the conditioning", _ADVICE)
        if read.file is None:
            tables = {table: _rows(getattr(read, table)) for table in TABLES}
        else:
            tables = _read_tables(inside(folder, read.file))
        conditioning = cls(names=read.names, guidance=read.guidance, **tables)
        if conditioning.file != read.file:
            raise GaqError(f"{folder / str(read.file)} was altered since it was written. {_ADVICE}.")
        return conditioning

    def name_of(self, seed: int) -> str:
        """Return the name of the condition that the image of a seed gets."""
        return self.names[seed % len(self.names)]

    def of(self, seeds: Sequence[int]) -> Condition:
        """Return the condition for images of these seeds, (N, ...); with guidance (2N, ...), unconditional first."""
        index = self._rows_of(seeds)
        chosen = {name: row[index] for name, row in self.rows.items()}
        if not self.guided:
            return chosen
        return {name: torch.cat((self.unconditional[name].expand_as(row), row)) for name, row in chosen.items()}

    def feeds(self, seeds: Sequence[int]) -> Condition:
        """Return the condition as an engine of whole steps takes it: (N, ...) each, and the guidance scale, (1,).

        It includes the unconditional condition whenever the network has one, also at a scale of 1.
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


def _read_tables(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tables that `Conditioning.save` wrote, by table and input; raise CalibError if they are damaged."""
    tables: dict[str, dict[str, Tensor]] = {table: {} for table in TABLES}
    for name, row in read_safetensors(path, checked=True)[1].items():
        table, _, key = name.partition("/")
        if table not in TABLES or row.dim() == 0:
            raise CalibError(f"{path} holds {name!r}, which no file of text states has. {_ADVICE}.")
        tables[table][key] = row
    return tables


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A `Conditioning` as JSON: its rows, which are integers, or the file that they are in."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    guidance: Finite
    file: str | None
    rows: dict[str, tuple[_Label | tuple[_Label, ...], ...]] = field(default_factory=dict)
    unconditional: dict[str, tuple[_Label | tuple[_Label, ...], ...]] = field(default_factory=dict)


def _rows(table: Mapping[str, Sequence[int | Sequence[int]]]) -> dict[str, Tensor]:
    try:
        return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in table.items()}
    except (TypeError, ValueError):
        raise CalibError(f"The record of the conditioning has rows of different lengths. {_ADVICE}.") from None


def class_conditioning(
    chosen: Sequence[int], *, unconditional: int | None = None, guidance: float = 1.0
) -> Conditioning:
    """Return conditioning on classes; `unconditional` is the label that stands for no class."""
    # int64 is PyTorch's type of an index, and so the type of this input in every exported graph.
    rows = {LABELS: torch.tensor(chosen, dtype=torch.int64)}
    null = {} if unconditional is None else {LABELS: torch.tensor([unconditional])}
    return Conditioning(names=tuple(map(str, chosen)), rows=rows, unconditional=null, guidance=guidance)


class Guided(nn.Module):
    """A network with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), called as (x, t, feeds).

        epsilon = epsilon(unconditional) + guidance * (epsilon(cond) - epsilon(unconditional))

    `feeds` is what `Conditioning.feeds` returns, the same inputs that an engine of whole steps takes.

    Args:
        network: called with both conditions in one batch of twice the size.
        apart: call it twice instead, since the batch of an engine has a limit.
    """

    def __init__(self, network: ConditionalNetwork, *, apart: bool = False) -> None:
        super().__init__()
        self.network, self.apart = network, apart

    def forward(self, x: Tensor, t: Tensor, feeds: Condition) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        names = [name for name in feeds if f"{UNCONDITIONAL}{name}" in feeds]
        cond = {name: feeds[name] for name in names}
        null = {name: feeds[f"{UNCONDITIONAL}{name}"] for name in names}
        if self.apart:
            unconditional = self.network(x, t, null)
            conditional = self.network(x, t, cond)
        else:
            # 2 x (N, ...) -> (2N, ...), unconditional first, as in `Conditioning.of` and in the calibration set.
            both = {name: torch.cat((null[name], cond[name])) for name in names}
            unconditional, conditional = self.network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        # The scale is (1,), or (N,) all alike in a calibration set.
        return unconditional + feeds[GUIDANCE][0] * (conditional - unconditional)


def bind(
    network: ConditionalNetwork, conditioning: Conditioning | None, seeds: Sequence[int], *, apart: bool = False
) -> Denoiser:
    """Return a network as a denoiser for images of these seeds, with guidance if there is any.

    Args:
        network: called as (x, t, cond), or as (x, t) if it is unconditional.
        conditioning: what to draw; if None, the network is returned unchanged.
        seeds: one per image.
        apart: whether guidance calls the network twice, see `Guided`.
    """
    if conditioning is None:
        return network
    guided = conditioning.guided
    # Built once for the whole loop: it does not change from step to step.
    condition = conditioning.feeds(seeds) if guided else conditioning.of(seeds)
    outer = Guided(network, apart=apart) if guided else network
    return lambda x, t, /: outer(x, t, {name: row.to(x.device) for name, row in condition.items()})
