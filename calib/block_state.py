"""A finished block on disk, so that a killed calibration continues where it was, to the same bytes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from calib.errors import CalibError
from calib.files import read_safetensors, write_atomically
from calib.plan import Grid
from calib.reconstruct import BlockResult


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """What the following blocks need: codes and learned input grids by layer name, sample scores, and the result."""

    codes: dict[str, Tensor]
    grids: dict[str, Grid]
    scores: Tensor
    result: BlockResult


def save_block_state(folder: Path, index: int, key: str, state: BlockState) -> None:
    """Write a finished block.

    Args:
        folder: of the blocks; made if need be.
        index: number of the block.
        key: identifies the calibration that it belongs to.
        state: what it gave.

    Raises:
        CalibError: the folder cannot be written.
    """
    tensors = {f"codes.{name}": codes.contiguous() for name, codes in state.codes.items()} | {"scores": state.scores}
    grids = {name: asdict(grid) for name, grid in state.grids.items()}
    header = {"key": key, "result": json.dumps(asdict(state.result)), "grids": json.dumps(grids)}
    write_atomically(folder / f"{index:03d}.safetensors", save(tensors, header))


def load_block_state(folder: Path, index: int, key: str) -> BlockState | None:
    """Return block number `index`, or None if it is absent, unreadable or of another calibration."""
    path = folder / f"{index:03d}.safetensors"
    if not path.is_file():
        return None
    try:
        header, tensors = read_safetensors(path)
    except CalibError:
        return None
    if header.get("key") != key:
        return None
    result = json.loads(header["result"])
    return BlockState(
        codes={name.removeprefix("codes."): v for name, v in tensors.items() if name != "scores"},
        grids={n: Grid(**{**grid, "zero": tuple(grid["zero"])}) for n, grid in json.loads(header["grids"]).items()},
        scores=tensors["scores"],
        result=BlockResult.from_json(result),
    )
