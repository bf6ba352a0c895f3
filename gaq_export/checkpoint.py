"""Read one diffusers folder: the U-Net, its scheduler config and a fingerprint of its weights.

In: a folder, flat or with `unet/` and `scheduler/` inside. Out: a float32 `UNet2DModel`. The files are read here and
not by diffusers' `from_pretrained`, which fills missing weights with noise and only logs that it did; here every
tensor must be present, expected, of the right shape and finite.
"""

import hashlib
import inspect
import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gaq_export.errors import GaqError

SAFETENSORS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"

# Names that attention layers had in checkpoints written before diffusers 0.12, google's among them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_log = logging.getLogger(__name__)


def unet_folder(folder: Path) -> Path:
    """Return where the U-Net lies in a diffusers folder: the folder itself, or its `unet/`.

    Raises:
        GaqError: If there is no such folder, or neither place holds a `config.json`.
    """
    if not folder.is_dir():
        raise GaqError(f"There is no model folder {folder}. Give a diffusers folder (config.json, {SAFETENSORS}).")
    for place in (folder, folder / "unet"):
        if (place / "config.json").is_file():
            return place
    raise GaqError(
        f"The model folder {folder} has no config.json, neither at its top nor in unet/. A diffusers folder, as "
        "written by save_pretrained, is needed."
    )


def scheduler_file(folder: Path) -> Path | None:
    """Return the scheduler config in a diffusers folder, or None if it holds none."""
    for place in (folder, folder / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return place / "scheduler_config.json"
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Read the U-Net's `config.json`.

    Args:
        folder: The folder that holds it, see `unet_folder`.

    Raises:
        GaqError: If it is no JSON object, or describes anything but an unconditional `UNet2DModel`.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GaqError(f"The model config {file} cannot be read as JSON: {error}") from error
    found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or found != "UNet2DModel":
        raise GaqError(f"The model config {file} describes a {found!r}; only 'UNet2DModel' is supported.")
    return config


def build_unet(config: Mapping[str, Any], origin: str) -> UNet2DModel:
    """Build a U-Net with random weights drawn from torch's global generator.

    Args:
        config: The architecture, as in `config.json`.
        origin: Where the config came from, for messages.

    Raises:
        GaqError: If diffusers rejects the architecture, or it is one no sampler here can drive.
    """
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    ignored = sorted(k for k in config if k not in known and not k.startswith("_"))
    if ignored:
        _log.warning("%s: this version of diffusers does not know %s; ignored", origin, ignored)
    try:
        unet = UNet2DModel(**{k: v for k, v in config.items() if k in known})
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        raise GaqError(f"diffusers cannot build the architecture in {origin}: {_one_line(error)}") from error
    if unet.config["class_embed_type"] is not None or unet.config["num_class_embeds"] is not None:
        raise GaqError(f"The model in {origin} wants class labels; only unconditional models are supported.")
    if unet.config["in_channels"] != unet.config["out_channels"]:
        raise GaqError(
            f"The model in {origin} turns {unet.config['in_channels']} channels into {unet.config['out_channels']}; "
            "a network that predicts noise returns as many as it takes (learned variances are not supported)."
        )
    if unet.config["sample_size"] is None:
        raise GaqError(f"The model config in {origin} has no sample_size; add the image size it was trained on.")
    return unet.eval().float()


def load_unet(folder: Path, *, allow_pickle: bool = False) -> UNet2DModel:
    """Load a U-Net with its weights, as float32 and in evaluation mode.

    Args:
        folder: The folder that holds `config.json` and the weights, see `unet_folder`.
        allow_pickle: Also take `diffusion_pytorch_model.bin`, read with torch's restricted unpickler.

    Raises:
        GaqError: If anything about the config or the weights is not as it must be.
    """
    config = read_config(folder)
    file, state = _read_weights(folder, allow_pickle)
    # The random weights drawn here are all replaced; the caller's random stream must not notice.
    with torch.random.fork_rng(devices=[]):
        unet = build_unet(config, str(folder / "config.json"))
    state = {_modern_name(name): value for name, value in state.items()}
    _check(state, unet, file)
    unet.load_state_dict({name: value.float() for name, value in state.items()})
    return unet


def fingerprint(network: nn.Module) -> str:
    """Hash a network's weights: sha256 over the sorted names, shapes and float32 bytes of its state.

    Args:
        network: Any module.

    Returns:
        64 hexadecimal digits, the same for the same weights whatever file they came from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_weights(folder: Path, allow_pickle: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    file, old = folder / SAFETENSORS, folder / PICKLE
    if not file.is_file() and old.is_file():
        if allow_pickle:
            return old, _read_pickle(old)
        raise GaqError(
            f"The weights in {folder} are a pickle ({PICKLE}), which can run code when read; {SAFETENSORS} is needed. "
            "If you trust the file, convert it once with diffusers: UNet2DModel.from_pretrained(folder)"
            ".save_pretrained(folder)."
        )
    try:
        return file, load_file(file)
    except FileNotFoundError as error:
        raise GaqError(
            f"The model folder {folder} has no weights beside its config.json; {SAFETENSORS} is needed."
        ) from error
    except (SafetensorError, OSError) as error:
        raise GaqError(f"The weights {file} are damaged ({_one_line(error)}). Copy them again.") from error


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise GaqError(f"The weights {file} are damaged ({_one_line(error)}). Fetch them again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise GaqError(f"The weights {file} are not a plain table of tensors.")
    return state


def _modern_name(name: str) -> str:
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


def _check(state: Mapping[str, torch.Tensor], unet: nn.Module, file: Path) -> None:
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise GaqError(
            f"The weights {file} do not fit the config.json beside them: {len(missing)} tensors missing "
            f"{_some(missing)}, {len(extra)} unexpected {_some(extra)}."
        )
    for name, value in state.items():
        if value.shape != expected[name]:
            raise GaqError(
                f"The tensor {name!r} in {file} has shape {tuple(value.shape)}, but the config.json beside it asks for "
                f"{tuple(expected[name])}."
            )
        if not value.is_floating_point():
            raise GaqError(f"The tensor {name!r} in {file} is {value.dtype}; floating-point weights are needed.")
        if not bool(value.isfinite().all()):
            raise GaqError(f"The tensor {name!r} in {file} holds NaN or infinite values; the checkpoint is damaged.")


def _some(names: list[str]) -> str:
    return "[" + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") + "]"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
