"""A finished block on disk: what is read is what was saved, and nothing else is taken for it."""

from pathlib import Path

import pytest
import torch

from calib.block_state import BlockState, load_block_state, save_block_state
from calib.choices import Rounding
from calib.plan import Grid
from calib.reconstruct import BlockResult


@pytest.fixture
def state() -> BlockState:
    return BlockState(
        codes={"down.conv": torch.tensor([[-8, 7], [0, 1]], dtype=torch.int8)},
        grids={"down.conv": Grid(scale=0.25, bits=8, zero=(-3,))},
        scores=torch.tensor([0.5, -1.0], dtype=torch.float64),
        result=BlockResult(
            name="down", layers=("down.conv",), loss_before=2.0, loss_after=1.5, rounding=Rounding.ADAROUND
        ),
    )


def test_a_block_is_read_back_as_it_was_saved(state: BlockState, tmp_path: Path) -> None:
    save_block_state(tmp_path, 3, "key", state)
    again = load_block_state(tmp_path, 3, "key")
    assert again is not None
    assert torch.equal(again.codes["down.conv"], state.codes["down.conv"])
    assert torch.equal(again.scores, state.scores)
    assert (again.grids, again.result) == (state.grids, state.result)
    assert again.result.rounding is Rounding.ADAROUND


def test_other_numbers_other_calibrations_and_damaged_files_give_none(state: BlockState, tmp_path: Path) -> None:
    save_block_state(tmp_path, 3, "key", state)
    assert load_block_state(tmp_path, 2, "key") is None
    assert load_block_state(tmp_path, 3, "another") is None
    file = tmp_path / "003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert load_block_state(tmp_path, 3, "key") is None
