"""Read a network from a diffusers folder, and fingerprint its weights.

In: a folder, flat or with `unet/` or `transformer/` and `scheduler/` inside. Out: a float32 network, one of
`ARCHITECTURES`. The files are read here and not by diffusers' `from_pretrained`, which fills missing weights with noise
and only logs that it did; here every tensor must be present, expected, of the right shape and finite.
"""

import hashlib
import inspect
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gaq_export.errors import GaqError, one_line
from gaq_export.models.architectures import ARCHITECTURES, config_of
from gaq_export.models.json_file import read_json

SAFETENSORS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
PICKLE = "diffusion_pytorch_model.bin"
PLACES = (".", "unet", "transformer")  # sub-folders that may hold the network


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """What the weights in a folder may be called, in the order of preference.

    Attributes:
        whole: Safetensors, all in one.
        half: The same in half precision.
        index: JSON that says which of several safetensors files has which tensor.
        pickle: The old format.
    """

    whole: str = SAFETENSORS
    half: str = HALF
    index: str = INDEX
    pickle: str = PICKLE


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

# Names that attention layers had in checkpoints written before diffusers 0.12, google's among them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

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


def read_config(folder: Path) -> dict[str, Any]:
    """Read a network's `config.json`.

    Args:
        folder: The folder that holds it, see `network_folder`.

    Raises:
        GaqError: If it is not a JSON object, or describes a network that is not in `ARCHITECTURES`.
    """
    file = folder / "config.json"
    config = read_json(file, "model config")
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
    kind = _CLASSES[config["_class_name"]]
    # With the parameters of its bases, which `ClassUNet` passes on as keywords.
    known = {name for base in kind.__mro__ for name in inspect.signature(base).parameters}
    ignored = sorted(k for k, v in config.items() if k not in known and not k.startswith("_") and v)
    if ignored:
        _log.warning("%s: this version of diffusers does not know %s; ignored", origin, ignored)
    # diffusers checks little of a config itself; the rest fails somewhere in the layers' constructors.
    try:
        network = kind(**{k: v for k, v in config.items() if k in known})
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        raise GaqError(f"diffusers cannot build the architecture in {origin}: {one_line(error)}") from error
    _require_drivable(network, origin)
    return network.eval().float()


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


def load_network(folder: Path, *, allow_pickle: bool = False) -> nn.Module:
    """Load a network with its weights, as float32 and in evaluation mode.

    Args:
        folder: The folder that holds `config.json` and the weights, see `network_folder`.
        allow_pickle: Also take `diffusion_pytorch_model.bin`, read with torch's restricted unpickler.

    Raises:
        GaqError: If the config or the weights are missing, damaged, or do not fit each other.
    """
    config = read_config(folder)
    # The random weights are all replaced: leave the caller's random stream alone.
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, str(folder / "config.json"))
    load_weights(network, folder, allow_pickle=allow_pickle)
    return network


def load_weights(
    network: nn.Module,
    folder: Path,
    *,
    allow_pickle: bool = False,
    files: WeightFiles = WeightFiles(),
    rename: Callable[[str], str | None] | None = None,
) -> None:
    """Fill a network with the weights in a folder.

    Args:
        network: Float32, built from the `config.json` beside the weights.
        folder: The folder that holds both.
        allow_pickle: As for `load_network`.
        files: What the weights may be called.
        rename: From a tensor's name in the file to its name in the network, None for one to leave out. By default the
            names that diffusers once gave to attention layers become today's.

    Raises:
        GaqError: If there are no weights, or they are damaged, or do not fit the network.
    """
    # Renamed before the check, so that a tensor with an old name is neither missing nor unexpected.
    file, state = _read_weights(folder, allow_pickle, files)
    renamed = {(rename or _modern_name)(name): value for name, value in state.items()}
    fill(network, {name: value for name, value in renamed.items() if name is not None}, file)


def fill(network: nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> None:
    """Fill a network with weights.

    Args:
        network: Float32.
        state: All of its tensors, by the names of its `state_dict`.
        file: Where they came from, for messages.

    Raises:
        GaqError: If a tensor is missing, unexpected, of another shape or kind, or not finite.
    """
    _check(state, network, file)
    parameters = network.state_dict()
    with torch.no_grad():
        for name, value in state.items():  # one by one: weights in half precision are never all in memory twice
            parameters[name].copy_(value)


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


def _read_weights(folder: Path, allow_pickle: bool, files: WeightFiles) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the preferred one of the weight files in a folder, and its tensors by name."""
    # Full precision first: a folder may hold both.
    for file in (folder / files.whole, folder / files.half):
        if file.is_file():
            return file, _read_safetensors(file)
    if (index := folder / files.index).is_file():
        return index, _read_shards(index)
    if not (pickled := folder / files.pickle).is_file():
        raise GaqError(f"The model folder {folder} has no weights beside its config.json; {files.whole} is needed.")
    if not allow_pickle:
        raise GaqError(
            f"The weights in {folder} are a pickle ({pickled.name}), which can run code when read; {files.whole} is "
            "needed. If you trust the file, convert it once with diffusers: "
            "from_pretrained(folder).save_pretrained(folder)."
        )
    _log.warning("%s is a pickle: it is read as tensors only, and no code in it is run", pickled)
    return pickled, tensors(read_pickle(pickled), pickled)


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise GaqError(f"The weights in {file.parent} are incomplete: {file.name} is needed.") from error
    except (SafetensorError, OSError) as error:
        raise GaqError(f"The weights {file} are damaged ({one_line(error)}). Copy them again.") from error


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GaqError(f"The index of weights {index} cannot be read ({one_line(error)}). Copy it again.") from error
    state: dict[str, torch.Tensor] = {}
    # Whole files: `fill` notices a tensor that is in none of them, or should not be in one.
    for name in sorted(names):
        state |= _read_safetensors(index.parent / name)
    return state


def read_pickle(file: Path) -> Any:
    """Read a foreign file with torch's restricted unpickler; raise GaqError if it holds more than plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of files that it then reads, or refuses, all the same
            return torch.load(file, map_location="cpu", weights_only=True)
    # What torch raises depends on where the file breaks off, and its unpickler runs into anything.
    except Exception as error:
        # Not torch's words, which advise to read such a file with the unpickler that runs code.
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise GaqError(
                f"The weights {file} hold more than tensors ({named[1]}), which could run code, so they were not read. "
                "Save the state_dict alone, best as .safetensors."
            ) from error
        reason = "not a table of tensors" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise GaqError(f"The weights {file} are damaged ({reason}). Fetch them again.") from error


def tensors(state: Any, file: Path) -> dict[str, torch.Tensor]:
    """Check that what `read_pickle` returned is a table of tensors by name, and return it; raise GaqError if not."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise GaqError(f"The weights {file} are not a plain table of tensors.")
    return state


def _modern_name(name: str) -> str:
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


def _check(state: Mapping[str, torch.Tensor], network: nn.Module, file: Path) -> None:
    expected = {name: value.shape for name, value in network.state_dict().items()}
    missing = sorted(set(expected) - set(state))
    extra = sorted(set(state) - set(expected))
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
