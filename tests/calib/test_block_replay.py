"""Recording blocks one after another: the same values as running the whole network, and each block run once."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from calib.block_replay import Replay
from calib.blocks import BlockIO, find_blocks
from calib.data import CalibrationSet
from calib.float_layers import float_reasons
from calib.sample_store import FileSamples, SampleStore
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel


def samples(count: int) -> CalibrationSet:
    t = torch.arange(count) * 10
    return CalibrationSet(x=torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)), t=t, step=t)


def block_names(network: EpsilonModel) -> list[str]:
    traced = trace(network, (1, 16, 16), 100)
    reasons = float_reasons(traced, "deploy")
    return [b.name for b in find_blocks(traced, {layer.name for layer in traced.layers} - reasons.keys())[0]]


def everything(rows: Tensor | FileSamples) -> Tensor:
    return rows[torch.arange(len(rows))]


@pytest.mark.parametrize("count", [4, 6])
def test_a_recorded_block_gives_its_recorded_output(tiny_unet: UNet2DModel, count: int) -> None:
    network, name = EpsilonModel(tiny_unet), "unet.down_blocks.1.resnets.0"
    inputs, batched, spec = Replay(network, samples(count), 4).inputs(name)
    output = Replay(network, samples(count), 4).output(name)
    args, kwargs = BlockIO(inputs=inputs, batched=batched, spec=spec, target=output).call()
    with torch.no_grad():
        assert torch.allclose(network.get_submodule(name)(*args, **kwargs), output, atol=1e-5)


@pytest.mark.parametrize("budget", [40_000, 1 << 30])
def test_replaying_gives_the_bits_of_computing_again(tiny_unet: UNet2DModel, budget: int) -> None:
    network, data = EpsilonModel(tiny_unet), samples(6)
    replay, computing = Replay(network, data, 4, budget=budget), Replay(network, data, 4, budget=0)
    plain = Replay(network, data, 4)
    for name in block_names(network):
        inputs, expected, nearly = (r.inputs(name)[0] for r in (replay, computing, plain))
        assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(inputs, nearly, strict=True))
        replay.finish(name)
        computing.finish(name)


def test_each_block_is_computed_once_for_each_micro_batch(tiny_unet: UNet2DModel) -> None:
    network = EpsilonModel(tiny_unet)
    names = block_names(network)
    calls: list[str] = []
    for name in names:
        inner = next(network.get_submodule(name).children())
        inner.register_forward_pre_hook(lambda *_, n=name: calls.append(n))
    replay = Replay(network, samples(6), 4)
    for name in names:
        replay.output(name)
    assert calls == [name for name in names for _ in range(2)]
    calls.clear()
    replay = Replay(network, samples(6), 4)
    for name in names:
        replay.inputs(name)
        replay.finish(name)
    assert calls == [name for name in names[:-1] for _ in range(2)]  # what follows the last is never asked for
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_block_changed_before_it_is_finished_is_seen_by_those_after_it(tiny_unet: UNet2DModel) -> None:
    network, data = EpsilonModel(tiny_unet), samples(4)
    first, second = block_names(network)[:2]
    replay = Replay(network, data, 4)
    replay.inputs(first)
    with torch.no_grad():
        network.get_submodule(first).conv1.weight.mul_(2)
    replay.finish(first)
    assert torch.equal(replay.inputs(second)[0][0], Replay(network, data, 4).inputs(second)[0][0])


def test_large_recordings_lie_in_files_and_read_the_same(tiny_unet: UNet2DModel, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("calib.sample_store.FILE_BYTES", 1000)
    network, data, name = EpsilonModel(tiny_unet), samples(5), "unet.down_blocks.0.resnets.0"
    filed = Replay(network, data, 4, SampleStore(folder=tmp_path)).output(name)
    assert isinstance(filed, FileSamples)
    assert (tmp_path / f"{name}.output").stat().st_size >= everything(filed).numel() * 4
    assert torch.equal(everything(filed), Replay(network, data, 4).output(name))


def test_rows_written_in_parts_are_read_back_in_any_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("calib.sample_store.FILE_BYTES", 0)
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    rows = SampleStore(folder=tmp_path).allocate(values[:1], 7, "rows")
    rows[0:4] = values[:4]
    rows[4:7] = values[4:]
    index = torch.tensor([6, 0, 0, 3])
    assert torch.equal(rows[index], values[index])


def test_a_part_of_a_part_is_that_part_of_the_whole() -> None:
    _, spec = torch.utils._pytree.tree_flatten(((torch.zeros(()),), {}))
    values = torch.arange(10.0)
    whole = BlockIO(inputs=(values,), batched=(True,), spec=spec, target=values)
    part = whole.part(torch.tensor([9, 7, 5, 3])).part(torch.tensor([0, 3]))
    assert len(part) == 2
    taken = part.take(torch.tensor([1, 0]))
    assert taken.target.tolist() == taken.call()[0][0].tolist() == [3.0, 9.0]
