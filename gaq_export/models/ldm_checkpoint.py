"""Read a network from an original checkpoint of latent diffusion or Stable Diffusion (Rombach et al. 2022).

In: `model.ckpt`, as the authors published it, and a network of diffusers' with the same architecture. Out: the weights
by diffusers' names, for which `BLOCKS` is the whole map. Where a checkpoint also holds the moving average of the
weights, that average is read, since the authors draw with it.
"""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaq_export.errors import GaqError
from gaq_export.models import weight_files
from gaq_export.models.architectures import config_of

FILE = "model.ckpt"
NETWORK = "model.diffusion_model."  # prefix of the network's tensors
AVERAGE = "model_ema.diffusion_model"  # prefix of their moving averages, whose names have no dots after it
TABLE = "cond_stage_model.embedding.weight"  # the rows of classes

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
# block in it; the original has one list of blocks for all levels, whose numbers `_numbers` puts for the other capitals.
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
    """Return the original name of every tensor of a network except the table of classes; q, k and v share one name.

    Args:
        network: A `UNet2DModel` or `UNet2DConditionModel`, its tensors possibly without values ("meta").

    Raises:
        GaqError: If it has a tensor that no network of latent diffusion has.
    """
    config = config_of(network)
    names = [name for name in network.state_dict() if name != "class_table.weight"]
    if not isinstance(config["layers_per_block"], int):
        raise GaqError(f"Latent diffusion has as many blocks at every level, not {config['layers_per_block']}.")
    attending = {int(name.split(".")[1]) for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {name: _original(name, config["layers_per_block"], attending) for name in names}


def _original(name: str, blocks: int, attending: set[int]) -> str:
    """Return the original name of a tensor.

    Args:
        name: diffusers' name of it.
        blocks: Residual blocks of a level on the way down; on the way up there is one more.
        attending: Levels on the way up that have attention.
    """
    for ours, theirs, parts in BLOCKS:
        pattern = ours.replace(".", r"\.").replace("I", r"(?P<i>\d+)").replace("J", r"(?P<j>\d+)") + r"\."
        match = re.match(pattern, name)
        if match is None:
            continue
        numbers = {key: int(value) for key, value in match.groupdict().items()}
        part, _, kind = name[match.end() :].rpartition(".")  # kind: weight or bias
        place = theirs
        for capital, number in _numbers(numbers.get("i", 0), numbers.get("j", 0), blocks, attending).items():
            place = place.replace(capital, str(number))
        return ".".join(filter(None, (place, parts.get(part, part), kind)))
    raise GaqError(f"The network has a tensor {name!r}, which no network of latent diffusion has.")


def _numbers(level: int, block: int, blocks: int, attending: set[int]) -> dict[str, int]:
    """Return the number for each capital in BLOCKS, for block `block` of level `level`; the rest as in `_original`."""
    last = level * (blocks + 1) + blocks
    return {
        "DOWN": 1 + level * (blocks + 1) + block,
        "NEXT": (level + 1) * (blocks + 1),
        "MIDDLE": 2 * block,
        "UP": level * (blocks + 1) + block,
        "LAST": last,
        "BEHIND": 2 if level in attending else 1,  # upsampling comes after the block's attention, if it has one
    }


def read(file: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a network from an original checkpoint.

    Args:
        file: The checkpoint, a pickle (read with torch's restricted unpickler) or safetensors.
        network: The network that the weights are for.

    Returns:
        The weights by the network's names; tensors that the file lacks are missing here too.

    Raises:
        GaqError: If the file is damaged, or holds no network of latent diffusion.
    """
    state = _state(file)
    averaged = any(name.startswith(AVERAGE) for name in state)
    if not averaged and not any(name.startswith(NETWORK) for name in state):
        raise GaqError(f"The checkpoint {file} holds no {NETWORK}*, so it is not a checkpoint of latent diffusion.")
    weights = {}
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    for name, original in original_names(network).items():
        key = f"{AVERAGE}{original.replace('.', '')}" if averaged else f"{NETWORK}{original}"
        if key in state:
            weights[name] = _part(state[key], name, shapes[name], config_of(network).get("attention_head_dim"))
    if "class_table.weight" in shapes and TABLE in state:
        weights["class_table.weight"] = state[TABLE]
    return weights


def _part(value: Tensor, name: str, shape: torch.Size, width: Any) -> Tensor:
    """Return the part of an original tensor that is one of ours: q, k or v out of all three, in our shape.

    Args:
        value: The original tensor.
        name: Our name of the part.
        shape: Its shape. Linear layers of ours may be convolutions of one pixel there, with two more axes of 1.
        width: Channels of a head, where the original has q, k and v in one tensor; None if there is one head.
    """
    which = re.search(r"attentions\.\d+\.to_([qkv])\.", name)
    if which is not None and value.numel() == 3 * shape.numel():
        # (3C, ...) -> (heads, 3, width, ...) -> (heads, width, ...): q, k and v alternate from head to head
        value = value.reshape(-1, 3, width or shape[0], *shape[1:])[:, "qkv".index(which[1])]
    # One of another size is returned as it is, for `weight_files.fill` to report.
    return value.reshape(shape) if value.numel() == shape.numel() else value


def _state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise GaqError(f"There is no checkpoint {file}.")
    if file.suffix == ".safetensors":
        return weight_files.read_safetensors(file)
    with _stand_ins(file):
        content = weight_files.read_pickle(file)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    return weight_files.tensors(state, file)


def _stand_ins(file: Path) -> Any:
    """Return a context in which a pickle may name classes of PyTorch Lightning; each is replaced by an empty class.

    Checkpoints hold the trainer's state beside the weights, and name its classes there. No code of the trainer is
    loaded or run.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, OSError):
        return nullcontext()
    known = [name for name in named if name.startswith("pytorch_lightning.")]
    empty: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in known]
    return torch.serialization.safe_globals(empty)
