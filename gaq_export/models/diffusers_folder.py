"""Read a network from a diffusers folder, and fingerprint its weights.

In: a folder, flat or with `unet/` or `transformer/` and `scheduler/` inside. Out: a float32 network, one of
`ARCHITECTURES`. The files are read here and not by diffusers' `from_pretrained`, which fills missing weights with noise
and only logs that it did; here every tensor must be present, expected, of the right shape and finite.
"""

import hashlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from gaq_export.errors import GaqError, one_line
from gaq_export.models.architectures import ARCHITECTURES, TIME_IDS, as_denoiser, condition_inputs_of, config_of
from gaq_export.models.json_file import read_json
from gaq_export.models.network_config import check_sizes
from gaq_export.models.trial import Example, require_forward, require_image_shape
from gaq_export.models.weight_files import SAFETENSORS, load_weights, stored_bytes

PLACES = (".", "unet", "transformer")  # sub-folders that may hold the network

_CLASSES = {kind.__name__: kind for kind in ARCHITECTURES}
# Fields of a config that make a network take more inputs than `ARCHITECTURES` knows, and their supported values.
_SUPPORTED: Mapping[type[nn.Module], Mapping[str, tuple[Any, ...]]] = {
    UNet2DModel: {"class_embed_type": (None,)},
    UNet2DConditionModel: {
        "class_embed_type": (None,),
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),
    },
}

# Blocks of U-Nets that are known to take every image that halves evenly.
_PLAIN_BLOCKS = {f"{kind}{way}Block2D" for kind in ("", "Attn", "CrossAttn") for way in ("Down", "Up")}

_LARGE = 1 << 28  # parameters, a GiB of them; smaller networks are built before their weights are looked at

_log = logging.getLogger(__name__)


def network_folder(folder: Path) -> Path:
    """Return the folder of the network in a diffusers folder: that folder itself, its `unet/` or its `transformer/`.

    Raises:
        GaqError: If there is no such folder, or no place holds a `config.json`.
    """
    if not folder.is_dir():
        raise GaqError(f"There is no model folder {folder}. Give a diffusers folder (config.json, {SAFETENSORS}).")
    for place in PLACES:
        if (folder / place / "config.json").is_file():
            return folder / place
    raise GaqError(
        f"The model folder {folder} has no config.json, neither at its top nor in unet/ or transformer/. A diffusers "
        "folder, as written by save_pretrained, is needed."
    )


def scheduler_file(folder: Path) -> Path | None:
    """Return the scheduler config in a diffusers folder, or None if it holds none."""
    for place in (folder, folder / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return place / "scheduler_config.json"
    return None


def shape_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of what a network with this config denoises."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a network's `config.json`.

    Args:
        folder: The folder that holds it, see `network_folder`.

    Raises:
        GaqError: If it is not a JSON object, or describes a network that is not in `ARCHITECTURES`.
    """
    file = folder / "config.json"
    config = read_json(file, "model config")
    check_sizes(config, f"The model config {file}")
    kind = config.get("_class_name")
    # The class of diffusion transformers until diffusers 0.29.
    if (kind, config.get("norm_type")) == ("Transformer2DModel", "ada_norm_zero"):
        return config | {"_class_name": "DiTTransformer2DModel"}
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise GaqError(f"The model config {file} describes a {kind!r}; supported are {sorted(_CLASSES)}.")
    return config


def build_network(config: Mapping[str, Any], origin: str) -> nn.Module:
    """Build a network with random weights drawn from torch's global generator.

    Args:
        config: The architecture, as in `config.json`.
        origin: Where the config came from, for messages.

    Raises:
        GaqError: If diffusers rejects the architecture, or no sampler here can use it.
    """
    network = _construct(config, origin)
    _require_drivable(network, origin)
    network = network.eval().float()
    if not _runs_surely(config_of(network)):
        example = Example(shape=shape_of(config_of(network)), timesteps=1000, condition=condition_inputs_of(network))
        require_forward(as_denoiser(network), example, f"Correct the architecture in {origin}.")
    return network


def _construct(config: Mapping[str, Any], origin: str) -> nn.Module:
    """Return diffusers' network; raise GaqError if it rejects the architecture."""
    kind = _CLASSES[config["_class_name"]]
    # With the parameters of its bases, which `ClassUNet` passes on as keywords.
    known = {name for base in kind.__mro__ for name in inspect.signature(base).parameters}
    ignored = sorted(k for k, v in config.items() if k not in known and not k.startswith("_") and v)
    if ignored:
        _log.warning("%s: this version of diffusers does not know %s; ignored", origin, ignored)
    # diffusers checks little of a config itself; the rest fails somewhere in the layers' constructors.
    try:
        return kind(**{k: v for k, v in config.items() if k in known})
    except Exception as error:
        raise GaqError(f"diffusers cannot build the architecture in {origin}: {one_line(error)}") from error


def _require_drivable(network: nn.Module, origin: str) -> None:
    """Raise GaqError if a network takes more inputs than `ARCHITECTURES` knows, or does not return noise."""
    config = config_of(network)
    for kind, fields in _SUPPORTED.items():
        for field, allowed in fields.items() if isinstance(network, kind) else ():
            if config[field] not in allowed:
                raise GaqError(
                    f"The model in {origin} has {field} {config[field]!r}; supported is only {list(allowed)}."
                )
    if not isinstance(config.get("cross_attention_dim", 0), int):
        raise GaqError(f"The model in {origin} has several widths of texts ({config['cross_attention_dim']}), not one.")
    inputs = config["in_channels"]
    outputs = config["out_channels"] or inputs  # transformers leave it out where the two are equal
    if outputs not in (inputs, 2 * inputs):
        raise GaqError(
            f"The model in {origin} turns {inputs} channels into {outputs}; a network that predicts noise returns as "
            "many as it takes, or with learned variances twice as many."
        )
    if config["sample_size"] is None:
        raise GaqError(f"The model config in {origin} has no sample_size; add the image size it was trained on.")
    require_image_shape(shape_of(config))
    if config.get("addition_embed_type") == "text_time":
        given = (config["projection_class_embeddings_input_dim"] or 0) - TIME_IDS * (
            config["addition_time_embed_dim"] or 0
        )
        if given < 1:
            raise GaqError(
                f"The model in {origin} has no room for {TIME_IDS} time ids beside a text, as Stable Diffusion XL has; "
                "a refiner takes five, and is not supported."
            )


def _runs_surely(config: Mapping[str, Any]) -> bool:
    """Return whether a network is of well-known blocks, and its size halves evenly on the way through them."""
    levels = len(config.get("block_out_channels", ()))
    unit = 2 ** (levels - 1) if levels else config.get("patch_size") or 1
    types = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    return types <= _PLAIN_BLOCKS and all(size % unit == 0 for size in shape_of(config)[1:])


def _require_as_large(config: Mapping[str, Any], folder: Path) -> None:
    """Raise GaqError if a config describes a network that is larger than the weights beside it, before it is built."""
    stored = stored_bytes(folder)
    with torch.device("meta"):  # shapes alone, without memory
        count = sum(value.numel() for value in _construct(config, str(folder / "config.json")).parameters())
    if stored and count > max(stored, _LARGE):  # a parameter takes a byte at least
        raise GaqError(
            f"{folder / 'config.json'} describes {count} parameters, but the weights beside it have {stored} bytes: "
            "they do not belong together, or were not fetched whole (a pointer of Git LFS has a hundred bytes)."
        )


def load_network(folder: Path, *, allow_pickle: bool = False) -> nn.Module:
    """Load a network with its weights, as float32 and in evaluation mode.

    Args:
        folder: The folder that holds `config.json` and the weights, see `network_folder`.
        allow_pickle: Also take `diffusion_pytorch_model.bin`, read with torch's restricted unpickler.

    Raises:
        GaqError: If the config or the weights are missing, damaged, or do not fit each other.
    """
    config = read_config(folder)
    _require_as_large(config, folder)
    # The random weights are all replaced: leave the caller's random stream alone.
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, str(folder / "config.json"))
    load_weights(network, folder, allow_pickle=allow_pickle)
    return network


def fingerprint(network: nn.Module) -> str:
    """Hash a network's weights: sha256 over the sorted names, shapes and float32 bytes of its state.

    Args:
        network: Any module.

    Returns:
        64 hexadecimal digits, the same for the same weights whatever file they came from.
    """
    digest = hashlib.sha256()
    # As sorted float32, because files differ in the order and precision in which they hold the same weights.
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
