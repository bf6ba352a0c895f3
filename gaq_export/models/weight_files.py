"""Read the weights in a folder: safetensors whole, in several files, or in a variant such as fp16; pickles if allowed.

In: a folder, and what its weights are called. Out: tensors by name, or a network that is filled with them. Every tensor
must be present, expected, of the right shape and finite. Names in an index stay inside its folder.
"""

import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gaq_export.errors import GaqError, one_line
from gaq_export.folders import inside
from gaq_export.models.json_file import read_record

_USUAL_VARIANTS = ("fp16", "bf16")  # the same weights in fewer bits
# Names that attention layers had in checkpoints written before diffusers 0.12, google's among them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What the weights in a folder are called.

        STEM.safetensors                     all in one file
        STEM.safetensors.index.json          in several, this file says which tensor is in which
        STEM.fp16.safetensors                a variant in one file
        STEM.safetensors.index.fp16.json     a variant in several; older: STEM.fp16.safetensors.index.json

    Attributes:
        stem: how the names begin.
        pickle: name of the old format.
    """

    stem: str
    pickle: str

    def preferred(self, names: Iterable[str]) -> str | None:
        """Return the file to begin with, of the `names` in a folder; None if there are no weights.

        Full precision first, then the variants; one file before several; a pickle only if there is nothing else.
        """
        names = list(names)
        found = [(*self._rank(match), match[0]) for name in names if (match := self._pattern.fullmatch(name))]
        return min(found)[-1] if found else next((name for name in names if name == self.pickle), None)

    def files(self, names: Iterable[str]) -> list[str]:
        """Return the preferred file and, if it is an index, those that belong to it by their names."""
        names = list(names)
        first = self.preferred(names)
        if first is None or not first.endswith(".json"):
            return [] if first is None else [first]
        variant = self.variant(first)
        stem = re.escape(self.stem)
        part = r"-\d+-of-\d+"
        parts = rf"{stem}\.{variant}{part}\.safetensors|{stem}{part}\.{variant}\.safetensors"
        pattern = parts if variant else rf"{stem}{part}\.safetensors"
        return [first, *(name for name in names if re.fullmatch(pattern, name))]

    def variant(self, name: str) -> str:
        """Return the variant that a weight file or index is of, "" for full precision."""
        match = self._pattern.fullmatch(name)
        return "" if match is None else match["before"] or match["behind"] or ""

    @property
    def _pattern(self) -> re.Pattern[str]:
        variant = r"\.(?P<{}>\w+)"
        return re.compile(
            rf"{re.escape(self.stem)}({variant.format('before')})?\.safetensors"
            rf"(?P<index>\.index({variant.format('behind')})?\.json)?"
        )

    def _rank(self, match: re.Match[str]) -> tuple[int, bool]:
        variant = match["before"] or match["behind"] or ""
        order = ("", *_USUAL_VARIANTS)
        return (order.index(variant) if variant in order else len(order)), match["index"] is not None


DIFFUSERS = Naming(stem="diffusion_pytorch_model", pickle="diffusion_pytorch_model.bin")
TRANSFORMERS = Naming(stem="model", pickle="pytorch_model.bin")
SAFETENSORS = f"{DIFFUSERS.stem}.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Index:
    """An index of weights: the file that each tensor is in."""

    weight_map: dict[str, str]


def load_weights(
    network: nn.Module,
    folder: Path,
    *,
    allow_pickle: bool = False,
    naming: Naming = DIFFUSERS,
    rename: Callable[[str], str | None] | None = None,
) -> None:
    """Fill a network with the weights in a folder.

    Args:
        network: Float32, built from the `config.json` beside the weights.
        folder: The folder that holds both.
        allow_pickle: Also take a pickle, read with torch's restricted unpickler.
        naming: What the weights are called.
        rename: From a tensor's name in the file to its name in the network, None for one to leave out. By default the
            names that diffusers once gave to attention layers become today's.

    Raises:
        GaqError: If there are no weights, or they are damaged, or do not fit the network.
    """
    # Renamed before the check, so that a tensor with an old name is neither missing nor unexpected.
    file, state = _read_weights(folder, allow_pickle, naming)
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


def stored_bytes(folder: Path, naming: Naming = DIFFUSERS) -> int:
    """Return the size of the weights that `load_weights` would read, so far as they are there."""
    first = naming.preferred(_names(folder))
    if first is None:
        return 0
    index = folder / first
    return sum(
        file.stat().st_size for file in (_shards(index) if index.suffix == ".json" else [index]) if file.is_file()
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _read_weights(folder: Path, allow_pickle: bool, naming: Naming) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the preferred one of the weight files in a folder, and its tensors by name."""
    first = naming.preferred(_names(folder))
    if first is None:
        raise GaqError(
            f"The model folder {folder} has no weights beside its config.json; {naming.stem}.safetensors is needed."
        )
    file = folder / first
    if (variant := naming.variant(first)) not in ("", *_USUAL_VARIANTS):
        _log.warning("%s holds no other weights than those of the variant %r, which are read", folder, variant)
    if file.suffix == ".json":
        # Whole files: `fill` notices a tensor that is in none of them, or should not be in one.
        parts = [read_safetensors(part) for part in _shards(file)]
        return file, {name: value for part in parts for name, value in part.items()}
    if first != naming.pickle:
        return file, read_safetensors(file)
    if not allow_pickle:
        raise GaqError(
            f"The weights in {folder} are a pickle ({first}), which can run code when read; {naming.stem}.safetensors "
            "is needed. If you trust the file, convert it once with diffusers: "
            "from_pretrained(folder).save_pretrained(folder)."
        )
    _log.warning("%s is a pickle: it is read as tensors only, and no code in it is run", file)
    return file, tensors(read_pickle(file), file)


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, all of them inside its folder."""
    fields = read_record(_Index, index, "index of weights")
    return [inside(index.parent, name) for name in sorted(set(fields.weight_map.values()))]


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a foreign safetensors file; raise GaqError if it is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise GaqError(f"The weights in {file.parent} are incomplete: {file.name} is needed.") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a type that torch does not have
        raise GaqError(f"The weights {file} are damaged ({one_line(error)}). Copy them again.") from error


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
        # As float32, in which torch knows what is finite: it does not for float8, and float64 may lie beyond.
        if not bool(value.to(torch.float32).isfinite().all()):
            raise GaqError(
                f"The tensor {name!r} in {file} holds NaN or values that are infinite in float32; the checkpoint is "
                "damaged."
            )


def _some(names: list[str]) -> str:
    return "[" + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") + "]"
