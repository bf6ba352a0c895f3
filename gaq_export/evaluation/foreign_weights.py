"""Weights of networks that score pictures, from files that anybody may have made: read as tensors, never as code.

In: a file, safetensors or a pickle of tensors. Out: a table of tensors. Libraries that load such a file themselves do
it with Python's full unpickler, which runs whatever the file asks for, so they are given what was read here.
"""

import io
from pathlib import Path

import torch
from torch import Tensor

from calib.files import read_safetensors
from gaq_export.errors import GaqError
from gaq_export.models.weight_files import read_pickle, tensors


def read_state(path: Path) -> dict[str, Tensor]:
    """Return a network's tensors by name.

    Args:
        path: safetensors, or a pickle that holds them as they are or under `state_dict`.

    Raises:
        GaqError, CalibError: there is no such file, or it holds anything but tensors.
    """
    if not path.is_file():
        raise GaqError(f"{path} is not there.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[1]
    content = read_pickle(path)
    # Checkpoints of a training hold other things beside the weights.
    return tensors(content.get("state_dict", content) if isinstance(content, dict) else content, path)


def as_file(state: dict[str, Tensor]) -> io.BytesIO:
    """Return the tensors as a file in memory, for a library that insists on unpickling one."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
