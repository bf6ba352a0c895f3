"""Recordings of blocks: inputs of the quantized network, outputs of the float one, and a scratch folder that goes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib import leftovers
from calib.block_recording import open_recorder
from calib.blocks import Block
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.leftovers import temporary_name
from calib.sample_store import SampleStore


class Chain(nn.Module):
    """Three layers in a row; the second and third are recorded."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second, self.third = (nn.Conv2d(2, 2, 1) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(x)))
        return out


def samples(count: int = 6) -> CalibrationSet:
    step = torch.arange(count)
    return CalibrationSet(x=torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(1)), t=step, step=step)


SECOND, THIRD = (Block(name=name, layers=(name,)) for name in ("second", "third"))


@pytest.mark.parametrize("on_disk", [False, True])
@torch.no_grad()
def test_inputs_are_the_quantized_networks_and_targets_the_float_ones(on_disk: bool, tmp_path: Path) -> None:
    exact, quantized, data = Chain(0), Chain(1), samples()
    folder = tmp_path / "blocks" if on_disk else None
    with open_recorder(exact, quantized, data, 4, SampleStore(folder=folder), reference=True) as recorder:
        second = recorder.record(SECOND).take(torch.arange(6))
        with torch.no_grad():  # as if the second layer had been quantized
            quantized.second.weight.mul_(0.5)
        recorder.finish(SECOND)
        third = recorder.record(THIRD).take(torch.arange(6))
    h, f = quantized.first(data.x), exact.first(data.x)
    for io, inputs, reference in (
        (second, h, f),
        (third, quantized.second(h), exact.second(f)),
    ):
        assert torch.allclose(io.inputs[0], inputs, atol=1e-6)
        assert torch.allclose(io.reference[0], reference, atol=1e-6)
    assert torch.allclose(second.target, exact.second(f), atol=1e-6)
    assert torch.allclose(third.target, exact(data.x, data.t), atol=1e-6)


def test_without_reference_the_float_networks_inputs_are_not_recorded() -> None:
    with open_recorder(Chain(0), Chain(1), samples(), 4) as recorder:
        assert recorder.record(SECOND).reference is None


def test_the_scratch_folder_goes_and_so_does_one_that_a_killed_run_left(tmp_path: Path) -> None:
    name = temporary_name(tmp_path, "scratch")
    left = tmp_path / f"{name[:-1]}{(int(name[-1]) + 1) % 10}.left"  # of a process that is no more
    left.mkdir()
    (left / "input-0").write_bytes(b"old")
    (tmp_path / "000.safetensors").write_bytes(b"a finished block")
    leftovers._clear.cache_clear()
    with open_recorder(Chain(0), Chain(1), samples(), 4, SampleStore(folder=tmp_path)) as recorder:
        assert not left.exists()
        recorder.record(SECOND)
        assert len(list(tmp_path.glob(".scratch.*"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["000.safetensors"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(CalibError, match=r"Cannot write .*blocks: .*Choose a folder you may write to"),
        open_recorder(Chain(0), Chain(1), samples(), 4, SampleStore(folder=tmp_path / "file" / "blocks")),
    ):
        pass
