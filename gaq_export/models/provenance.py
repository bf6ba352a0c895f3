"""What a plan and an engine record about the float model they came from, and how to load that model again.

In: a `LoadedModel` and its sampler. Out: a `Provenance`, written as JSON into the plan (which treats it as opaque) and
into the engine record. `find_model` goes the other way and refuses any model but the one recorded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field

from calib.plan import QuantPlan
from calib.records import Count, Finite, Positive, Text, check_record
from calib.surgery import apply_surgery
from gaq_export.devices import ON_HOST, Device
from gaq_export.diffusion.conditioning import LABELS, Conditioning
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.architectures import class_rows
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.hub import wanted
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.source import MODULE, WeightSource

_ADVICE = "Calibrate and build again"
Size = Annotated[int, Field(ge=1, le=1 << 16)]  # of a side of an image, or its channels


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    source: Text
    fingerprint: str
    shape: tuple[Size, Size, Size]
    classes: Count | None
    meaningless: bool


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    alpha_bar: Annotated[tuple[Finite, ...], Field(min_length=1)]
    clip: Positive | None
    variance: str
    last: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    source: Text
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A `Provenance` as JSON; conditioning and decoder are left out where there is none, and the CPU as a device."""

    model: _Model
    architecture: dict[str, Any]
    sampler: SamplerSpec
    schedule: _Schedule
    conditioning: dict[str, Any] | None = None
    decoder: _Decoder | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class DecoderProvenance:
    """Where the decoder of a model's latents was loaded from, and the sha256 of its weights."""

    source: WeightSource
    fingerprint: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Provenance:
    """The float model behind a plan or an engine, and the sampler it is drawn with.

    Attributes:
        name: the model's name.
        source: where to get its weights again.
        fingerprint: sha256 of its weights.
        shape: (C, H, W) of what the network denoises.
        classes: rows of its class table, the unconditional one included; None if it has none.
        random_weights: whether the weights are random, and pictures meaningless.
        architecture: the network's config; empty for the caller's own module.
        sampler: the sampler.
        schedule: the noise schedule.
        conditioning: as `Conditioning.to_json` writes it; None for an unconditional model. Text states are in a file in
            the same folder, see `load_conditioning`.
        decoder: of latents; None if the network denoises images.
        device: what it was calibrated on, `Device.kind`.
    """

    name: str
    source: WeightSource
    fingerprint: str
    shape: tuple[int, int, int]
    classes: int | None
    random_weights: bool
    architecture: Mapping[str, Any]
    sampler: SamplerSpec
    schedule: NoiseSchedule
    conditioning: Mapping[str, Any] | None = None
    decoder: DecoderProvenance | None = None
    device: str = "cpu"

    @classmethod
    def of(cls, model: LoadedModel, sampler: SamplerSpec) -> Self:
        """Describe a model that is drawn with `sampler`."""
        config = getattr(model.module, "config", model.spec.config)
        # Fields with an underscore are diffusers' own notes, such as its version and the path of the file.
        public = {name: value for name, value in config.items() if not name.startswith("_")}
        return cls(
            name=model.spec.name,
            source=model.source,
            fingerprint=model.fingerprint,
            shape=model.shape,
            classes=class_rows(model.module),
            random_weights=model.random_weights,
            architecture=json.loads(json.dumps(public)),  # tuples become lists, as they will be when read again
            sampler=sampler,
            schedule=model.schedule,
            conditioning=None if model.conditioning is None else model.conditioning.to_json(),
            decoder=None
            if model.decoder is None
            else DecoderProvenance(source=model.source, fingerprint=fingerprint(model.decoder)),
            device=model.device.kind,
        )

    @property
    def model_record(self) -> dict[str, Any]:
        """What identifies the model, as JSON."""
        return {
            "name": self.name,
            "source": str(self.source),
            "fingerprint": self.fingerprint,
            "shape": list(self.shape),
            "classes": self.classes,
            "meaningless": self.random_weights,  # this name is part of the plan's format
        }

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; their order is part of the plan's bytes."""
        optional: dict[str, Any] = {}
        if self.conditioning is not None:
            optional["conditioning"] = dict(self.conditioning)
        if self.decoder is not None:
            optional["decoder"] = {"source": str(self.decoder.source), "fingerprint": self.decoder.fingerprint}
        if self.device != "cpu":
            optional["device"] = self.device
        return optional | {
            "model": self.model_record,
            "architecture": dict(self.architecture),
            "sampler": self.sampler.to_json(),
            "schedule": {
                # Python writes as many digits as it takes to read the same float64 again.
                "alpha_bar": self.schedule.alpha_bar.tolist(),
                "clip": self.schedule.clip,
                "variance": self.schedule.variance,
                "last": self.schedule.last,
            },
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned, the schedule to the bit.

        Raises:
            CalibError, GaqError: a part is missing, unknown, of the wrong kind or out of range.
        """
        record = check_record(_Record, fields, "The record of the float model", _ADVICE)
        model, schedule, decoder = record.model, record.schedule, record.decoder
        read = cls(
            name=model.name,
            source=WeightSource.parse(model.source),
            fingerprint=model.fingerprint,
            shape=model.shape,
            classes=model.classes,
            random_weights=model.meaningless,
            architecture=record.architecture,
            sampler=record.sampler,
            schedule=NoiseSchedule(
                alpha_bar=torch.tensor(schedule.alpha_bar, dtype=torch.float64),
                clip=schedule.clip,
                variance=schedule.variance,
                last=schedule.last,
            ),
            conditioning=record.conditioning,
            decoder=None
            if decoder is None
            else DecoderProvenance(source=WeightSource.parse(decoder.source), fingerprint=decoder.fingerprint),
            device=record.device,
        )
        timesteps(read.sampler, read.schedule.num_train)  # raises before anything is made for each of its steps
        return read

    @property
    def network_config(self) -> dict[str, Any]:
        """The network's config: all of it if it is one of diffusers', else its channels and image size."""
        channels, height, width = self.shape
        size = height if height == width else [height, width]
        return {"in_channels": channels, "out_channels": channels, "sample_size": size} | dict(self.architecture)

    def moved_to(self, source: WeightSource) -> Self:
        """Return the record with another source for the weights, the decoder's included."""
        decoder = self.decoder and replace(self.decoder, source=source)
        return replace(self, source=source, decoder=decoder)


def provenance_of(plan: QuantPlan) -> Provenance:
    """Return what a plan records about its float model.

    Raises:
        CalibError, GaqError: the record is incomplete, or of a model with other timesteps than the plan.
    """
    provenance = Provenance.from_json(plan.provenance)
    if provenance.schedule.num_train != plan.num_train:
        raise GaqError(
            f"The plan is for {plan.num_train} training timesteps, its model has {provenance.schedule.num_train}. "
            f"{_ADVICE}."
        )
    return provenance


def load_conditioning(provenance: Provenance, folder: Path) -> Conditioning | None:
    """Return the recorded conditioning, None for an unconditional model.

    Args:
        provenance: of a plan or an engine.
        folder: the folder of the plan or engine, which also holds the file with text states if there are any.

    Raises:
        CalibError, GaqError: that file is missing, damaged, or not the recorded one.
    """
    if provenance.conditioning is None:
        return None
    conditioning = Conditioning.from_json(provenance.conditioning, folder)
    labels = [table[LABELS] for table in (conditioning.rows, conditioning.unconditional) if LABELS in table]
    if provenance.classes is not None and any(int(table.max()) >= provenance.classes for table in labels):
        raise GaqError(f"The record of the conditioning names a class beyond {provenance.classes - 1}. {_ADVICE}.")
    return conditioning


def find_model(
    provenance: Provenance, model: LoadedModel | None, folder: Path, device: Device = ON_HOST
) -> LoadedModel:
    """Return the recorded float model with the recorded conditioning.

    Args:
        provenance: of a plan or an engine.
        model: the model, which is checked; loaded again if None.
        folder: the folder of the plan or engine.
        device: where a model that is loaded again computes.

    Raises:
        GaqError: it is another model, has another decoder, or cannot be loaded.
    """
    if model is None:
        if provenance.source == MODULE:
            raise GaqError(f"{provenance.name!r} is a module of your own: call this from Python with model=wrap(...).")
        model = load_model(provenance.name, provenance.source, device)
    # Compared by content and not by name or path: any copy of the same weights will do.
    if model.fingerprint != provenance.fingerprint:
        raise GaqError(
            f"This plan belongs to another model: it was made from {provenance.name} with weights "
            f"{provenance.fingerprint[:12]}, found {model.spec.name} with {model.fingerprint[:12]}. Calibrate again."
        )
    decoder = provenance.decoder
    if decoder is not None and (model.decoder is None or fingerprint(model.decoder) != decoder.fingerprint):
        present = "another" if model.decoder is not None else "none"
        raise GaqError(
            f"{provenance.name} was calibrated with a decoder of latents, weights {decoder.fingerprint[:12]}, from "
            f"{decoder.source}; found {present} with this model. Calibrate again, in another run folder."
        )
    # The recorded conditioning and not the model's: a model may be loaded before anything is chosen to draw.
    return replace(model, conditioning=load_conditioning(provenance, folder))


def files_of_model(model: LoadedModel) -> list[Path]:
    """Return the user's files that a model was loaded from, which nothing may be written over."""
    path = model.source.path
    if path is None or not path.is_dir():
        return [path] if path is not None else []
    return [path / name for name in wanted([file.relative_to(path).as_posix() for file in path.rglob("*")])]


def rewritten(model: LoadedModel, plan: QuantPlan) -> LoadedModel:
    """Return the model with its network as the plan's layers name it; the same model if the plan rewrites no layer."""
    network = apply_surgery(model.network, plan.surgery)
    return model if network is model.network else replace(model, module=network)
