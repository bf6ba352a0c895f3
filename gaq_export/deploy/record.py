"""The engine record: what an engine file was made from and how to draw with it, read and written only here.

`engines` stores a JSON object beside each engine without knowing what it means (`EngineFile.metadata`). This module
gives it its meaning: `EngineRecord.to_json` when an engine is built, `record_of` when one is used.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, NonNegativeInt

from calib.correction import Correction
from calib.records import Finite, Sha256, check_record
from engines import EngineFile
from gaq_export.errors import GaqError, unknown
from gaq_export.models.provenance import Provenance

_ADVICE = "Build the engine again"
FORMAT = 1  # raised when older records can no longer be read
Choice = TypeVar("Choice", bound=StrEnum)


class GraphKind(StrEnum):
    """What a graph computes; the values are what `--graph` takes."""

    STEP = "step"
    EPS = "eps"

    @property
    def meaning(self) -> str:
        """One line for a help text."""
        return {
            GraphKind.STEP: "one whole denoising step of a fixed sampler: (x, step) -> x_next",
            GraphKind.EPS: "the network alone, for any sampler: (x, t) -> eps",
        }[self]


class Numbers(StrEnum):
    """What weights and activations are rounded to; the values are what `--numbers` takes."""

    INT8 = "int8"
    FP8 = "fp8"


def parse_choice(what: str, value: str, choices: type[Choice]) -> Choice:
    """Return the member of an enumeration with this value; raise GaqError, naming all of them, if there is none."""
    try:
        return choices(value)
    except ValueError:
        raise unknown(what, value, choices) from None


@dataclass(frozen=True, kw_only=True)
class LinkedFile:
    """A file in the engine's folder, by name and sha256."""

    file: str
    sha256: Sha256

    def to_json(self) -> dict[str, str]:
        """Return JSON values."""
        return {"file": self.file, "sha256": self.sha256}


def link(file: EngineFile) -> LinkedFile:
    """Return the link by which another engine's record, in the same folder, names this engine."""
    return LinkedFile(file=file.path.name, sha256=file.sha256)


@dataclass(frozen=True, kw_only=True)
class Switching:
    """Engines that take turns in one loop, since steps differ in activation bits.

    Attributes:
        engines: all but the engine with this record, by rising activation bits.
        turns: for each step, the index of its engine; the engine with this record comes last.
    """

    engines: tuple[LinkedFile, ...]
    turns: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]  # (S,)


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """The text encoders of an engine that takes prompts.

    Attributes:
        engines: their engines, in the order of the pipeline's.
        tokenizers: JSON files of the `tokenizers` library, one for each.
        zeros: whether zeros stand for the empty prompt.
        time_ids: sizes and crop that Stable Diffusion XL takes, (1, 6); None for other models.
    """

    engines: tuple[LinkedFile, ...]
    tokenizers: tuple[LinkedFile, ...]
    zeros: bool
    time_ids: Sequence[Sequence[Finite]] | None


@dataclass(frozen=True, kw_only=True)
class PlanLink:
    """The plan that an engine was built from: the sha256 of its file, and how many layers it quantizes."""

    sha256: Sha256
    layers: NonNegativeInt


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineRecord:
    """How an engine was made and how to draw with it.

    Attributes:
        provenance: the float model; its sampler is the one that the engine was built for.
        graph: what the engine computes.
        bits: bits of weights and activations, such as W4A8; "float" for an engine of the float network.
        numbers: whether those bits are integers or floats.
        plan: None for an engine of the float network.
        correction: of the predicted noise; None if there is none.
        tables: modules of the network that are time tables in the engine.
        switching: engines that take turns with this one; None if it does all steps.
        decoder: engine of the decoder of its latents; None if it draws images, or latents without a decoder.
        text_encoders: None if it takes no prompts, or its folder had no encoders.
    """

    provenance: Provenance
    graph: GraphKind
    bits: str
    numbers: Numbers = Numbers.INT8
    plan: PlanLink | None = None
    correction: Correction | None = None
    tables: tuple[str, ...] = ()
    switching: Switching | None = None
    decoder: LinkedFile | None = None
    text_encoders: TextEncoders | None = None

    @property
    def whole_steps(self) -> bool:
        """Whether the engine computes whole denoising steps rather than the predicted noise alone."""
        return self.graph is GraphKind.STEP

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        switching = self.switching
        texts = self.text_encoders
        # A part that an engine lacks is written as null, so that every record has the same keys.
        return {
            "format": FORMAT,
            "provenance": self.provenance.to_json(),
            "graph": str(self.graph),
            "bits": self.bits,
            "numbers": str(self.numbers),
            "plan": self.plan and {"sha256": self.plan.sha256, "layers": self.plan.layers},
            "correction": self.correction and self.correction.to_json(),
            "tables": list(self.tables),
            "switching": switching
            and {"engines": [one.to_json() for one in switching.engines], "turns": list(switching.turns)},
            "decoder": self.decoder and self.decoder.to_json(),
            "text_encoders": texts
            and {
                "engines": [one.to_json() for one in texts.engines],
                "tokenizers": [one.to_json() for one in texts.tokenizers],
                "zeros": texts.zeros,
                "time_ids": texts.time_ids,
            },
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: object) -> Self:
        """Read what `to_json` returned.

        Raises:
            CalibError, GaqError: a part is missing, unknown, of the wrong kind or out of range, or the parts do not
                fit each other.
        """
        record = check_record(_Record, fields, where, _ADVICE)
        provenance = Provenance.from_json(record.provenance)
        steps, channels = provenance.sampler.steps, provenance.shape[0]
        correction, switching = record.correction, record.switching
        if correction is not None and (len(correction.gain), len(correction.gain[0])) != (steps, channels):
            raise GaqError(f"{where}: correction is not for {steps} steps and {channels} channels. {_ADVICE}.")
        if switching is not None and (len(switching.turns) != steps or max(switching.turns) > len(switching.engines)):
            raise GaqError(f"{where}: switching does not name one of the engines for each of {steps} steps. {_ADVICE}.")
        others = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return cls(**{name: part for name, part in others.items() if name != "format"} | {"provenance": provenance})


@dataclass(frozen=True, kw_only=True)
class _Record:
    """An `EngineRecord` as JSON, every part of which is there; the provenance is read by its own module."""

    format: int
    provenance: dict[str, Any]
    graph: GraphKind
    bits: str
    numbers: Numbers
    plan: PlanLink | None
    correction: Correction | None
    tables: tuple[str, ...]
    switching: Switching | None
    decoder: LinkedFile | None
    text_encoders: TextEncoders | None


def record_of(file: EngineFile) -> EngineRecord:
    """Return the record of an engine file.

    Raises:
        CalibError, GaqError: it was written by another version, or is incomplete.
    """
    # Checked first, because another version's record may lack any key.
    version = file.metadata.get("format")
    if version != FORMAT:
        raise GaqError(
            f"The record of {file.path} has format {version!r}; this version reads {FORMAT}. Build the engine again."
        )
    return EngineRecord.from_json(file.metadata, f"The record of {file.path}")
