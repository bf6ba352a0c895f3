"""The one function that turns a name, a folder or a checkpoint into a network.

In: a name from `MODELS`, a diffusers folder, or an original checkpoint of latent diffusion. Out: a `LoadedModel`: the
float network, the noise schedule it was trained with, and the `source` that gives the same weights again.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.devices import on_device
from gaq_export.devices import ON_HOST, Device, find_device
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, default_sampler, under_guidance
from gaq_export.errors import GaqError, unknown
from gaq_export.models import diffusers_folder, hub, ldm_checkpoint, own_module, pipeline_index, weight_files
from gaq_export.models.architectures import as_denoiser, condition_inputs_of, config_of
from gaq_export.models.latent_decoder import find_decoder
from gaq_export.models.registry import MODELS, WEIGHTS, ModelSpec
from gaq_export.models.scheduler_config import (
    read_scheduler,
    read_scheduler_config,
    schedule_from_scheduler_config,
)
from gaq_export.models.source import BUNDLED, MODULE, ORIGINAL, SourceKind, WeightSource
from gaq_export.models.trial import Example

__all__ = ["MODELS", "LoadedModel", "ModelSpec", "load_model", "random_model", "wrap"]

MODELS_VARIABLE = "GAQ_EXPORT_MODELS"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A network ready to run, with all that is needed to draw with it and to load it again.

    Attributes:
        spec: Name, sampler and architecture.
        module: The network as it was loaded, float32, in evaluation mode.
        schedule: The noise schedule it was trained with.
        source: What `load_model` takes as `weights` to load the same network again; a path is absolute.
        fingerprint: sha256 of the weights, see `diffusers_folder.fingerprint`.
        random_weights: Whether the weights are random, and images meaningless.
        conditioning: What to draw; None if the network takes no conditioning, or none was chosen yet.
        decoder: Makes images of latents, (N, C, h, w) to (N, 3, H, W) in [-1, 1]; None if the network draws images.
        instead: Why its sampler is not what its scheduler config names, as half a sentence; empty if it is, or if the
            sampler was chosen by name.
        device: Where network and decoder compute, see `on`.
    """

    spec: ModelSpec
    module: nn.Module
    schedule: NoiseSchedule
    source: WeightSource
    fingerprint: str
    random_weights: bool
    conditioning: Conditioning | None = None
    decoder: nn.Module | None = None
    instead: str = ""
    device: Device = ON_HOST

    @cached_property
    def network(self) -> nn.Module:
        """The network as a module called `(x, t)` or `(x, t, cond)`; plans and graphs use its layers' names."""
        return as_denoiser(self.module)

    @cached_property
    def condition_inputs(self) -> dict[str, Tensor]:
        """An example of the network's condition, one row (1, ...) of each tensor; empty if it takes x and t alone."""
        if self.conditioning is None:
            return condition_inputs_of(self.module)
        return {name: rows[:1] for name, rows in self.conditioning.rows.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, or of its latents if there is a decoder."""
        return diffusers_folder.shape_of(self.spec.config)

    @property
    def guided(self) -> bool:
        """Whether the network is called with guidance, on twice as many samples as images."""
        return self.conditioning is not None and self.conditioning.guided

    def with_sampler(self, sampler: SamplerSpec | None) -> "LoadedModel":
        """Return the model with another sampler; the same model if None."""
        return self if sampler is None else replace(self, spec=replace(self.spec, sampler=sampler), instead="")

    def on(self, device: Device | str, *, tf32: bool = False) -> "LoadedModel":
        """Return the model on another device; this one stays where it is.

        Args:
            device: "auto", "cpu", "cuda", "cuda:N" or "mps"; or a `Device`.
            tf32: Whether a CUDA GPU may round products of float32 to TensorFloat-32; a `Device` says so itself.

        Raises:
            GaqError: There is no such device here.
        """
        device = device if isinstance(device, Device) else find_device(device, tf32=tf32)
        if device == self.device:
            return self
        decoder = self.decoder and on_device(self.decoder, device.place)
        return replace(self, module=on_device(self.module, device.place), decoder=decoder, device=device)

    @property
    def sampler_note(self) -> str:
        """A sentence for the user if another sampler stands in for that of the scheduler config; else empty."""
        if not self.instead:
            return ""
        return (
            f"{self.instead[:1].upper()}{self.instead[1:]}; drawn with {self.spec.sampler} instead. --sampler, "
            "--spacing and --steps choose others."
        )

    def sampling(self, sampler: SamplerSpec | None = None) -> Sampling:
        """Return how the network is sampled, with its own sampler if None; latents are not decoded."""
        return Sampling(
            schedule=self.schedule,
            shape=self.shape,
            sampler=sampler or self.spec.sampler,
            conditioning=self.conditioning,
            device=self.device,
        )

    def image_sampling(self, sampler: SamplerSpec | None = None) -> Sampling:
        """Return how images are drawn: as `sampling`, and latents are decoded."""
        # The loop of the sampler has ended by then, and its no_grad with it.
        decode = None if self.decoder is None else torch.no_grad()(self.decoder)
        return replace(self.sampling(sampler), decode=decode)


def load_model(
    name: str | None = None, weights: str | Path | WeightSource | None = None, device: Device | str = ON_HOST
) -> LoadedModel:
    """Load a model by name, from a folder, or with random weights.

    Without `weights`, a name is looked for in the folder that GAQ_EXPORT_MODELS names (one sub-folder per model),
    then among the bundled models, then on the Hugging Face hub.

    Args:
        name: A key of `MODELS`. With a folder it is only what to call the model (the folder's name if None); a known
            name also sets the sampler. The folder's own config decides the structure.
        weights: A diffusers folder; an original checkpoint (`ldm_checkpoint`), or a folder with its `model.ckpt`;
            "random" or "random:SEED" for random weights; "hub:OWNER/NAME" or "hub:OWNER/NAME@COMMIT"; or the
            `source` of an earlier `LoadedModel`.
        device: Where it computes: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        GaqError: If the model is unknown, unreachable, damaged, or of a kind that is not supported; if there is no such
            device here.
    """
    place = device if isinstance(device, Device) else find_device(device)  # before anything is read
    return _load(name, weights).on(place)


def _load(name: str | None, weights: str | Path | WeightSource | None) -> LoadedModel:
    if weights is None:
        return _by_name(_known(name))
    source = weights if isinstance(weights, WeightSource) else WeightSource.parse(str(weights))
    if source.kind is SourceKind.BUNDLED:
        return _bundled(_known(name))
    if source.kind is SourceKind.RANDOM:
        return random_model(_known(name), source.seed)
    if source.kind is SourceKind.HUB:
        return _from_hub(name or source.repository.rpartition("/")[2], source)
    # The other kinds cannot be loaded, so "module", "original" or "pack" from a user is the name of a folder.
    path = Path(str(source)).expanduser().resolve()  # absolute, because plans record it
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise GaqError(f"The name of {path} is no text in UTF-8, so no record can hold it: rename it.") from error
    checkpoint = path if path.suffix in (".ckpt", ".safetensors") else path / ldm_checkpoint.FILE
    if checkpoint.is_file():
        return _from_checkpoint(checkpoint, name, path)
    return _from_folder(path, name or path.name, WeightSource.at(path))


def random_model(spec: ModelSpec, seed: int = 0) -> LoadedModel:
    """Build a model with random weights.

    Args:
        spec: A row of `MODELS`, perhaps `registry.reduced`.
        seed: Seed of the weights.
    """
    # The caller's random stream stays as it was; no devices, because the weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = diffusers_folder.build_network(spec.config, f"the table, model {spec.name!r}")
    return LoadedModel(
        spec=spec,
        module=module,
        schedule=schedule_from_scheduler_config(spec.scheduler),
        source=MODULE if spec.source == MODULE else WeightSource.random(seed),
        fingerprint=diffusers_folder.fingerprint(module),
        random_weights=True,
    )


def wrap(
    module: nn.Module,
    *,
    shape: tuple[int, int, int],
    schedule: NoiseSchedule,
    sampler: SamplerSpec | None = None,
    name: str = "module",
    conditioning: Conditioning | None = None,
    decoder: nn.Module | None = None,
) -> LoadedModel:
    """Make a model of any module called as `(x (N, C, H, W), t (N,)) -> predicted noise (N, C, H, W)`.

    The noise may also be in a tuple of one, or the `sample` of the object that the module returns. The module is tried
    once on noise. Weights in half precision become float32, weight norms are computed, and a batch norm behind a layer
    is folded into it, all of this in a copy.

    Args:
        module: The network; it is put into evaluation mode.
        shape: (C, H, W) of an image.
        schedule: The noise schedule it was trained with.
        sampler: How its images are drawn; DDIM in 50 steps, or as many as there are timesteps, if None, see
            `schedule.under_guidance`.
        name: What to call it.
        conditioning: What to draw, for a module that takes its condition as a third argument, tensors by name.
        decoder: Makes images in [-1, 1] of the sampler's result, for a module that works on latents.

    Raises:
        GaqError: The shape is not (C, H, W), or the module's forward pass fails, mixes the images of a batch, or
            returns something else than the noise.
    """
    # A known architecture may get its conditioning later.
    condition = {k: v[:1] for k, v in conditioning.rows.items()} if conditioning else condition_inputs_of(module)
    example = Example(shape=shape, timesteps=schedule.num_train, condition=condition)
    module = own_module.prepare(module, example)
    channels, height, width = shape
    spec = ModelSpec(
        name=name,
        source=MODULE,
        sampler=sampler
        or under_guidance(
            default_sampler(schedule.num_train), schedule, conditioning.guidance if conditioning else 1.0
        ),
        config={"in_channels": channels, "sample_size": (height, width)},  # the fields that `LoadedModel.shape` reads
        scheduler={},  # the schedule is given as a value
        description="a module of the caller's",
    )
    return LoadedModel(
        spec=spec,
        module=module,
        schedule=schedule,
        source=MODULE,
        fingerprint=diffusers_folder.fingerprint(module),
        random_weights=False,
        conditioning=conditioning,
        decoder=decoder if decoder is None else decoder.eval(),
    )


def _known(name: str | None) -> ModelSpec:
    """Return the row of `MODELS`; raise GaqError if there is none, or no name."""
    if name is None:
        raise GaqError(f"No model was named. Choose one of {list(MODELS)}, or give a diffusers folder with --weights.")
    if name not in MODELS:
        raise unknown("model", name, MODELS, "Or give a diffusers folder with --weights.")
    return MODELS[name]


def _by_name(spec: ModelSpec) -> LoadedModel:
    """Load a known model from this machine or, if its weights are not here, from where they are published."""
    local = _models_folder(spec.name)  # first, so that a machine without a network can provide any model
    if local is not None and (local / ldm_checkpoint.FILE).is_file():
        return _from_checkpoint(local / ldm_checkpoint.FILE, spec.name, local)
    if local is not None:
        return _from_folder(local, spec.name, WeightSource.at(local))
    if spec.source == BUNDLED:
        return _bundled(spec)
    if spec.source == ORIGINAL:
        raise GaqError(
            f"The weights of {spec.name!r} are published only as their authors' checkpoint "
            f"({ldm_checkpoint.FILE}): give that file with --weights, or try the tool with --weights random."
        )
    return _from_hub(spec.name, spec.source)


def _models_folder(name: str) -> Path | None:
    """Return the user's folder of a known model, None if there is none."""
    value = os.environ.get(MODELS_VARIABLE)
    if not value:
        return None
    parent = Path(value).expanduser().resolve()
    if not parent.is_dir():
        raise GaqError(f"{MODELS_VARIABLE} names {parent}, which is not a folder; correct or unset it.")
    return parent / name if (parent / name).is_dir() else None


def _bundled_names() -> list[str]:
    return [row.name for row in MODELS.values() if row.source == BUNDLED]


def _bundled(spec: ModelSpec) -> LoadedModel:
    if spec.source != BUNDLED:
        raise GaqError(f"The weights of {spec.name!r} are not bundled. Bundled models: {_bundled_names()}.")
    return _from_folder(WEIGHTS / spec.name, spec.name, BUNDLED)


def _from_hub(name: str, source: WeightSource) -> LoadedModel:
    try:
        folder, commit = hub.fetch(source.repository, source.commit)
    except GaqError as error:
        raise GaqError(
            f"{error} Give a local diffusers folder with --weights, set {MODELS_VARIABLE} to a folder with a "
            f"sub-folder {name!r}, try the tool with --weights random, or use a bundled model: {_bundled_names()}."
        ) from error
    # With the commit that was fetched, since the newest one changes. Older repositories hold only pickles.
    return _from_folder(folder, name, WeightSource.hub(source.repository, commit), allow_pickle=True)


def _from_folder(folder: Path, name: str, source: WeightSource, *, allow_pickle: bool = False) -> LoadedModel:
    pipeline_index.read_index(folder)  # first: it says whether the rest is drawn here as it is meant to be
    module = diffusers_folder.load_network(diffusers_folder.network_folder(folder), allow_pickle=allow_pickle)
    # Looked for in the pipeline folder, of which the network has only a sub-folder.
    decoder = find_decoder(folder, int(config_of(module)["in_channels"]), allow_pickle=allow_pickle)
    return replace(_trained(module, folder, name, source), decoder=decoder)


def _from_checkpoint(file: Path, name: str | None, path: Path) -> LoadedModel:
    """Load an original checkpoint, with the architecture of a known model or of a `config.json` beside it.

    Args:
        file: The checkpoint.
        name: What to call the model; the file's name if None.
        path: What the user gave, the checkpoint or its folder.
    """
    has_config = (file.parent / "config.json").is_file()
    config = diffusers_folder.read_config(file.parent) if has_config else _known(name).config
    with torch.random.fork_rng(devices=[]):  # the random weights are all replaced: leave the caller's stream alone
        module = diffusers_folder.build_network(config, f"the model {name or file.stem!r}")
    weight_files.fill(module, ldm_checkpoint.read(file, module), file)
    decoder = find_decoder(file.parent, int(config_of(module)["in_channels"]))
    return replace(_trained(module, file.parent, name or file.stem, WeightSource.at(path)), decoder=decoder)


def _trained(module: nn.Module, folder: Path, name: str, source: WeightSource) -> LoadedModel:
    """Return a network that has its weights as a model without a decoder.

    Args:
        module: The network.
        folder: May hold a scheduler config, which takes precedence over the table's.
        name: What to call the model; if the table knows it, its row says how images are drawn.
        source: Where the weights come from.
    """
    row = MODELS.get(name)
    fields = config_of(module)
    # Fields with an underscore are diffusers' notes: its version, the path of the file, fields left at their defaults.
    config = {"_class_name": type(module).__name__} | {k: v for k, v in fields.items() if not k.startswith("_")}
    scheduler, where = _scheduler(folder, row)
    reading = read_scheduler(scheduler, where)
    if row is not None:
        # The table's source stays in the row; `LoadedModel.source` says where these weights came from.
        spec = replace(row, config=config, scheduler=scheduler)
    else:
        spec = ModelSpec(
            name=name,
            source=source,
            sampler=reading.sampler,
            config=config,
            scheduler=scheduler,
            description=f"{type(module).__name__} from {source}",
        )
    return LoadedModel(
        spec=spec,
        module=module,
        schedule=reading.schedule,
        source=source,
        fingerprint=diffusers_folder.fingerprint(module),
        random_weights=False,
        instead=reading.instead if row is None else "",  # the table's sampler is what its papers draw with
    )


def _scheduler(folder: Path, row: ModelSpec | None) -> tuple[Mapping[str, Any], object]:
    """Return the scheduler config in a folder or, if it has none, that of the table, and what to call it."""
    file = diffusers_folder.scheduler_file(folder)
    if file is not None:
        return read_scheduler_config(file), file
    if row is not None:
        return row.scheduler, f"The scheduler config of {row.name!r}"
    raise GaqError(
        f"The model folder {folder} has no scheduler_config.json, neither at its top nor in scheduler/; it says "
        "which noise schedule the model was trained with."
    )
