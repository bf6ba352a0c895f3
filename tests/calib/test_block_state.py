"""A finished block on disk: what is read is what was saved, and nothing else is taken for it."""

from pathlib import Path

import pytest
import torch

from calib.block_state import BlockState, load_block_state, save_block_state
from calib.choices import Rounding
from calib.files import read_safetensors, write_checked
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


def test_a_flipped_byte_is_noticed_wherever_it_is_and_the_log_says_so(
    state: BlockState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_block_state(tmp_path, 3, "key", state)
    file = tmp_path / "003.safetensors"
    whole = file.read_bytes()
    for place in range(len(whole)):
        caplog.clear()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert load_block_state(tmp_path, 3, "key") is None
        assert "003.safetensors is damaged, altered or of another version: it is made again." in caplog.text


@pytest.mark.parametrize("name", ["result", "grids"])
@pytest.mark.parametrize("text", [None, "", "[]", "null", '{"a": 1}', "[" * 100_000, '{"name": "down"}'])
def test_a_header_of_another_form_is_noticed_even_with_its_checksum(
    name: str, text: str | None, state: BlockState, tmp_path: Path
) -> None:
    save_block_state(tmp_path, 3, "key", state)
    file = tmp_path / "003.safetensors"
    header, tensors = read_safetensors(file)
    write_checked(file, tensors, {key: value for key, value in (header | {name: text}).items() if value is not None})
    assert load_block_state(tmp_path, 3, "key") is None


@pytest.mark.parametrize("name", ["scores", "codes.down.conv"])
@pytest.mark.parametrize("value", [None, torch.zeros(2, 2)])
def test_tensors_of_another_kind_are_noticed_even_with_their_checksum(
    name: str, value: torch.Tensor | None, state: BlockState, tmp_path: Path
) -> None:
    save_block_state(tmp_path, 3, "key", state)
    file = tmp_path / "003.safetensors"
    header, tensors = read_safetensors(file)
    changed = {key: kept for key, kept in (tensors | {name: value}).items() if kept is not None}
    write_checked(file, changed, header)
    assert load_block_state(tmp_path, 3, "key") is None
