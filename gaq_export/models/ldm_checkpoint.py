"""Read a network from an original checkpoint of latent diffusion or Stable Diffusion (Rombach et al. 2022).

In: `model.ckpt`, as the authors published it, and a network of diffusers' with the same architecture. Out: its weights
by diffusers' names. `BLOCKS` is the whole map. Where a checkpoint holds the moving average of the weights as well, that
is what it gives, since the authors draw with it.
"""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gaq_export.errors import GaqError
from gaq_export.models import diffusers_folder
from gaq_export.models.architectures import config_of

FILE = "model.ckpt"
NETWORK, AVERAGE, TABLE = "model.diffusion_model.", "model_ema.diffusion_model", "cond_stage_model.embedding.weight"

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_EMBEDDING = {"linear_1": "0", "linear_2": "2"}

# diffusers' name of a block, the original one, and the parts inside that are named differently. I is the level, J the
# block in it; what the other capitals mean follows from those, see `_numbers`.
BLOCKS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("time_embedding", "time_embed", _EMBEDDING),
    ("add_embedding", "label_emb.0", _EMBEDDING),
    ("conv_in", "input_blocks.0.0", {}),
    ("down_blocks.I.resnets.J", "input_blocks.DOWN.0", _RESIDUAL),
    ("down_blocks.I.attentions.J", "input_blocks.DOWN.1", _ATTENTION),
    ("down_blocks.I.downsamplers.J.conv", "input_blocks.NEXT.0.op", {}),
    ("mid_block.resnets.J", "middle_block.MIDDLE", _RESIDUAL),
    ("mid_block.attentions.J", "middle_block.1", _ATTENTION),
    ("up_blocks.I.resnets.J", "output_blocks.UP.0", _RESIDUAL),
    ("up_blocks.I.attentions.J", "output_blocks.UP.1", _ATTENTION),
    ("up_blocks.I.upsamplers.J.conv", "output_blocks.LAST.BEHIND.conv", {}),
    ("conv_norm_out", "out.0", {}),
    ("conv_out", "out.2", {}),
)


def original_names(network: nn.Module) -> dict[str, str]:
    """Return the original name of every tensor of a network, but for a table of classes; q, k and v share one.

    Args:
        network: A `UNet2DModel` or `UNet2DConditionModel`, its tensors possibly without values ("meta").

    Raises:
        GaqError: If it has a tensor that latent diffusion's networks have not.
    """
    config = config_of(network)
    names = [name for name in network.state_dict() if name != "class_table.weight"]
    if not isinstance(config["layers_per_block"], int):
        raise GaqError(f"Latent diffusion has as many blocks at every level, not {config['layers_per_block']}.")
    everything = set(names)
    return {name: _original(name, config["layers_per_block"], everything) for name in names}


def _original(name: str, blocks: int, names: set[str]) -> str:
    for ours, theirs, parts in BLOCKS:
        found = re.match(ours.replace(".", r"\.").replace("I", r"(?P<i>\d+)").replace("J", r"(?P<j>\d+)") + r"\.", name)
        if found is None:
            continue
        numbers = {key: int(value) for key, value in found.groupdict().items()}
        part, _, kind = name[found.end() :].rpartition(".")
        place = theirs
        for capital, number in _numbers(numbers.get("i", 0), numbers.get("j", 0), blocks, names).items():
            place = place.replace(capital, str(number))
        return ".".join(filter(None, (place, parts.get(part, part), kind)))
    raise GaqError(f"The network has a tensor {name!r}, which no network of latent diffusion has.")


def _numbers(level: int, block: int, blocks: int, names: set[str]) -> dict[str, int]:
    """Return what the capitals in BLOCKS mean: the original numbers blocks through all levels."""
    last = level * (blocks + 1) + blocks
    attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in names)
    return {
        "DOWN": 1 + level * (blocks + 1) + block,
        "NEXT": (level + 1) * (blocks + 1),
        "MIDDLE": 2 * block,
        "UP": level * (blocks + 1) + block,
        "LAST": last,
        "BEHIND": 2 if attends else 1,
    }


def read(file: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a network from an original checkpoint.

    Args:
        file: The checkpoint, a pickle (read with torch's restricted unpickler) or safetensors.
        network: What they are for.

    Returns:
        Its weights, by its own names. Those that the file lacks are missing.

    Raises:
        GaqError: If the file is damaged, or holds no network of latent diffusion.
    """
    state = _state(file)
    averaged = any(name.startswith(AVERAGE) for name in state)
    if not averaged and not any(name.startswith(NETWORK) for name in state):
        raise GaqError(f"The checkpoint {file} holds no {NETWORK}*, so it is none of latent diffusion.")
    found = {}
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    for name, original in original_names(network).items():
        key = f"{AVERAGE}{original.replace('.', '')}" if averaged else f"{NETWORK}{original}"
        if key in state:
            found[name] = _part(state[key], name, shapes[name], config_of(network).get("attention_head_dim"))
    if "class_table.weight" in shapes and TABLE in state:
        found["class_table.weight"] = state[TABLE]
    return found


def _part(value: Tensor, name: str, shape: torch.Size, width: Any) -> Tensor:
    """Return what a tensor of ours holds of the original one: q, k or v out of all three, without an axis of 1.

    Args:
        value: the original one.
        name: of ours.
        shape: of ours.
        width: of a head, where there are q, k and v in one.
    """
    which = re.search(r"attentions\.\d+\.to_([qkv])\.", name)
    if which is not None and value.numel() == 3 * shape.numel():
        value = value.reshape(-1, 3, width or shape[0], *shape[1:])[:, "qkv".index(which[1])]  # (heads, 3, width, ...)
    return value.reshape(shape) if value.numel() == shape.numel() else value


def _state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise GaqError(f"There is no checkpoint {file}.")
    if file.suffix == ".safetensors":
        return load_file(file)
    with _stand_ins(file):
        content = diffusers_folder.read_pickle(file)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    return diffusers_folder.tensors(state, file)


def _stand_ins(file: Path) -> Any:
    """Return a context that lets a file name classes of the trainer it was written by: an empty one takes their place.

    The trainer's notes beside the weights name them; nothing of it is loaded or run.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, OSError):
        return nullcontext()
    known = [name for name in named if name.startswith("pytorch_lightning.")]
    empty: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in known]
    return torch.serialization.safe_globals(empty)
