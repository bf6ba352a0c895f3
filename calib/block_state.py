"""A finished block on disk, so that a killed calibration continues where it was, to the same bytes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from calib.errors import CalibError
from calib.files import read_kept, write_checked
from calib.plan import Grid
from calib.reconstruct import BlockResult
from calib.records import parse_record

_ADVICE = "Run calibrate again"


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
    tensors = {f"codes.{name}": codes for name, codes in state.codes.items()} | {"scores": state.scores}
    grids = {name: asdict(grid) for name, grid in state.grids.items()}
    header = {"key": key, "result": json.dumps(asdict(state.result)), "grids": json.dumps(grids)}
    write_checked(folder / f"{index:03d}.safetensors", tensors, header)


def load_block_state(folder: Path, index: int, key: str) -> BlockState | None:
    """Return block number `index`, or None if it is absent, of another calibration, or does not verify."""
    path = folder / f"{index:03d}.safetensors"

    def parse(header: dict[str, str], tensors: dict[str, Tensor]) -> BlockState | None:
        if header.get("key") != key:
            return None
        result = parse_record(BlockResult, header.get("result", ""), path, _ADVICE)
        grids = parse_record(dict[str, Grid], header.get("grids", ""), path, _ADVICE)
        scores = tensors.pop("scores", None)
        codes = {name.removeprefix("codes."): value for name, value in tensors.items()}
        whole = codes.keys() == set(result.layers) and all(c.dtype == torch.int8 for c in codes.values())
        if scores is None or scores.dim() != 1 or scores.dtype != torch.float64 or not whole:
            raise CalibError(f"{path} does not hold the scores and the int8 codes of {result.layers}. {_ADVICE}.")
        return BlockState(codes=codes, grids=grids, scores=scores, result=result)

    return read_kept(path, parse)
