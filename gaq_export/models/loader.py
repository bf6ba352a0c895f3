"""The one function that turns a name, a folder or a checkpoint into a network.

In: a name from `MODELS`, a diffusers folder, or an original checkpoint of latent diffusion. Out: a `LoadedModel`: the
float network, the noise schedule it was trained with, and a `source` that finds the same weights again.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, under_guidance
from gaq_export.errors import GaqError
from gaq_export.models import diffusers_folder, hub, ldm_checkpoint
from gaq_export.models.architectures import as_denoiser, condition_inputs_of, config_of
from gaq_export.models.latent_decoder import find_decoder
from gaq_export.models.registry import MODELS, WEIGHTS, ModelSpec
from gaq_export.models.scheduler_config import read_scheduler_config, schedule_from_scheduler_config
from gaq_export.models.source import BUNDLED, MODULE, ORIGINAL, SourceKind, WeightSource

__all__ = ["MODELS", "LoadedModel", "ModelSpec", "load_model", "random_model", "wrap"]

MODELS_VARIABLE = "GAQ_EXPORT_MODELS"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A network ready to run, and how to find it again.

    Attributes:
        spec: Name, sampler and architecture.
        unet: The network as it was loaded, float32, in evaluation mode, on the CPU.
        schedule: The noise schedule it was trained with.
        source: What to pass as `load_model`'s `weights` to get the same network; a path is absolute.
        fingerprint: sha256 of the weights, see `checkpoint.fingerprint`.
        meaningless: True if the weights are random, so that images show nothing.
        conditioning: What it is told to draw; None if it is told nothing.
        decoder: What makes images of its latents, (N, C, h, w) to (N, 3, H, W) in [-1, 1]; None if it draws images.
    """

    spec: ModelSpec
    unet: nn.Module
    schedule: NoiseSchedule
    source: WeightSource
    fingerprint: str
    meaningless: bool
    conditioning: Conditioning | None = None
    decoder: nn.Module | None = None

    @cached_property
    def network(self) -> nn.Module:
        """The network as a module called `(x, t)`; plans and graphs use its layers' names."""
        return as_denoiser(self.unet)

    @cached_property
    def condition_inputs(self) -> dict[str, Tensor]:
        """A row, (1, ...), of everything that the network is told beside x and t; empty if that is nothing."""
        known = self.conditioning
        return condition_inputs_of(self.unet) if known is None else {name: row[:1] for name, row in known.rows.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, or of its latents if there is a decoder."""
        size = self.spec.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.spec.config["in_channels"]), int(height), int(width)


def load_model(name: str | None = None, weights: str | Path | WeightSource | None = None) -> LoadedModel:
    """Load a model by name, from a folder, or with random weights.

    Without `weights`, a name is looked for in the folder that GAQ_EXPORT_MODELS names (one sub-folder per model),
    then among the bundled models, then on the Hugging Face hub.

    Args:
        name: A key of `MODELS`. With a folder it is only what to call the model (the folder's name if None), and
            lends its sampler if it is a known one; the folder's own config decides the structure.
        weights: A diffusers folder; an original checkpoint (`ldm_checkpoint`), or a folder with its `model.ckpt`;
            "random" or "random:SEED" for random weights; "hub:OWNER/NAME" or "hub:OWNER/NAME@COMMIT"; or the
            `source` of an earlier `LoadedModel`.

    Raises:
        GaqError: If the model is unknown, out of reach, damaged or of a kind that is not supported.
    """
    if weights is None:
        return _by_name(_known(name))
    source = weights if isinstance(weights, WeightSource) else WeightSource.parse(str(weights))
    if source.kind is SourceKind.BUNDLED:
        return _bundled(_known(name))
    if source.kind is SourceKind.RANDOM:
        return random_model(_known(name), source.seed)
    if source.kind is SourceKind.HUB:
        return _from_hub(name or source.repository.rpartition("/")[2], source)
    # No other kind can be loaded, so that its word can only be the name of a folder.
    path = Path(str(source)).expanduser().resolve()
    original = path if path.suffix in (".ckpt", ".safetensors") else path / ldm_checkpoint.FILE
    if original.is_file():
        return _from_original(original, name, path)
    return _from_folder(path, name or path.name, WeightSource.at(path))


def _by_name(spec: ModelSpec) -> LoadedModel:
    """Load a known model from where its weights are on this machine or, failing that, from where they are published."""
    local = _models_folder(spec.name)
    if local is not None and (local / ldm_checkpoint.FILE).is_file():
        return _from_original(local / ldm_checkpoint.FILE, spec.name, local)
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

    Args:
        module: The network; it is put into evaluation mode.
        shape: (C, H, W) of an image.
        schedule: The noise schedule it was trained with.
        sampler: How its images are drawn; 50 DDIM steps if None, see `schedule.under_guidance`.
        name: What to call it.
        conditioning: What to draw, for a module that is told so in a third argument, a mapping by name.
        decoder: What makes images in [-1, 1] of what the sampler ends with, for a module that works on latents.
    """
    channels, height, width = shape
    spec = ModelSpec(
        name=name,
        source=MODULE,
        sampler=sampler or under_guidance(SamplerSpec(), schedule, conditioning.guidance if conditioning else 1.0),
        config={"in_channels": channels, "sample_size": (height, width)},
        scheduler={},
        description="a module of the caller's",
    )
    module.eval()
    return LoadedModel(
        spec=spec,
        unet=module,
        schedule=schedule,
        source=MODULE,
        fingerprint=diffusers_folder.fingerprint(module),
        meaningless=False,
        conditioning=conditioning,
        decoder=decoder if decoder is None else decoder.eval(),
    )


def _known(name: str | None) -> ModelSpec:
    if name is None:
        raise GaqError(f"No model was named. Choose one of {list(MODELS)}, or give a diffusers folder with --weights.")
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise GaqError(
            f"Unknown model {name!r}.{hint} Choose one of {list(MODELS)}, or give a diffusers folder with --weights."
        )
    return MODELS[name]


def _models_folder(name: str) -> Path | None:
    value = os.environ.get(MODELS_VARIABLE)
    if not value:
        return None
    parent = Path(value).expanduser().resolve()
    if not parent.is_dir():
        raise GaqError(f"{MODELS_VARIABLE} names {parent}, which is not a folder; correct or unset it.")
    return parent / name if (parent / name).is_dir() else None


def _bundled(spec: ModelSpec) -> LoadedModel:
    if spec.source != BUNDLED:
        bundled = [row.name for row in MODELS.values() if row.source == BUNDLED]
        raise GaqError(f"The weights of {spec.name!r} are not bundled. Bundled models: {bundled}.")
    return _from_folder(WEIGHTS / spec.name, spec.name, BUNDLED)


def random_model(spec: ModelSpec, seed: int = 0) -> LoadedModel:
    """Build a model with random weights.

    Args:
        spec: A row of `MODELS`, perhaps `catalogue.reduced`.
        seed: Of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers_folder.build_network(spec.config, f"the table, model {spec.name!r}")
    return LoadedModel(
        spec=spec,
        unet=unet,
        schedule=schedule_from_scheduler_config(spec.scheduler),
        source=MODULE if spec.source == MODULE else WeightSource.random(seed),
        fingerprint=diffusers_folder.fingerprint(unet),
        meaningless=True,
    )


def _from_hub(name: str, source: WeightSource) -> LoadedModel:
    try:
        folder, commit = hub.fetch(source.repository, source.commit)
    except GaqError as error:
        bundled = [row.name for row in MODELS.values() if row.source == BUNDLED]
        raise GaqError(
            f"{error} Give a local diffusers folder with --weights, set {MODELS_VARIABLE} to a folder with a "
            f"sub-folder {name!r}, try the tool with --weights random, or use a bundled model: {bundled}."
        ) from error
    return _from_folder(folder, name, WeightSource.hub(source.repository, commit), allow_pickle=True)


def _from_folder(folder: Path, name: str, source: WeightSource, *, allow_pickle: bool = False) -> LoadedModel:
    unet = diffusers_folder.load_network(diffusers_folder.network_folder(folder), allow_pickle=allow_pickle)
    return _loaded(unet, folder, name, source, allow_pickle=allow_pickle)


def _from_original(file: Path, name: str | None, path: Path) -> LoadedModel:
    """Load an original checkpoint, as the architecture of a known model or of a `config.json` beside it.

    Args:
        file: The checkpoint.
        name: What to call the model; after the file if None.
        path: What was asked to be loaded, the checkpoint or its folder.
    """
    beside = (file.parent / "config.json").is_file()
    config = diffusers_folder.read_config(file.parent) if beside else _known(name).config
    with torch.random.fork_rng(devices=[]):
        unet = diffusers_folder.build_network(config, f"the model {name or file.stem!r}")
    diffusers_folder.fill(unet, ldm_checkpoint.read(file, unet), file)
    return _loaded(unet, file.parent, name or file.stem, WeightSource.at(path))


def _loaded(
    unet: nn.Module, folder: Path, name: str, source: WeightSource, *, allow_pickle: bool = False
) -> LoadedModel:
    """Return a network with its weights as a model; `folder` may say how it was trained, or the row of its name."""
    row, fields = MODELS.get(name), config_of(unet)
    config = {"_class_name": type(unet).__name__} | {k: v for k, v in fields.items() if not k.startswith("_")}
    scheduler = _scheduler(folder, row)
    if row is not None:
        spec = replace(row, config=config, scheduler=scheduler)
    else:
        spec = ModelSpec(
            name=name,
            source=source,
            sampler=SamplerSpec(),
            config=config,
            scheduler=scheduler,
            description=f"{type(unet).__name__} from {source}",
        )
    return LoadedModel(
        spec=spec,
        unet=unet,
        schedule=schedule_from_scheduler_config(spec.scheduler),
        source=source,
        fingerprint=diffusers_folder.fingerprint(unet),
        meaningless=False,
        decoder=find_decoder(folder, int(fields["in_channels"]), allow_pickle=allow_pickle),
    )


def _scheduler(folder: Path, row: ModelSpec | None) -> Mapping[str, Any]:
    file = diffusers_folder.scheduler_file(folder)
    if file is not None:
        return read_scheduler_config(file)
    if row is not None:
        return row.scheduler
    raise GaqError(
        f"The model folder {folder} has no scheduler_config.json, neither at its top nor in scheduler/; it says "
        "which noise schedule the model was trained with."
    )
