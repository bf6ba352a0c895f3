"""Where blocks begin, in networks of several kinds, and recordings of their inputs."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib.blocks import Block, BlockIO, find_blocks
from calib.float_layers import float_reasons
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel, condition_inputs_of


def test_a_foreign_network_is_cut_by_structure(make_foreign) -> None:
    traced = trace(make_foreign(), (1, 8, 8), 100)
    reasons = float_reasons(traced, "deploy")
    blocks, loose = find_blocks(traced, {layer.name for layer in traced.layers} - reasons.keys())
    assert [(b.name, b.layers) for b in blocks] == [
        ("down", ("down",)),
        ("gate", ("gate",)),
        ("mlp", ("mlp.0", "mlp.2")),
    ]
    assert loose == ["shared"]


def test_a_diffusers_unet_is_cut_into_residual_and_attention_blocks(tiny_unet: UNet2DModel) -> None:
    traced = trace(EpsilonModel(tiny_unet), (1, 16, 16), 100)
    reasons = float_reasons(traced, "deploy")
    assert {n.removeprefix("unet.") for n, why in reasons.items() if "layer" in why} == {"conv_in", "conv_out"}
    assert all("time_emb" in n for n, why in reasons.items() if "step alone" in why)
    blocks, loose = find_blocks(traced, {layer.name for layer in traced.layers} - reasons.keys())
    assert loose == []
    kinds = [type(EpsilonModel(tiny_unet).get_submodule(b.name)).__name__ for b in blocks]
    assert set(kinds) == {"ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}
    assert sum(len(b.layers) for b in blocks) == len(traced.layers) - len(reasons)


def test_transformers_are_cut_into_their_blocks_whatever_they_are_conditioned_on() -> None:
    small = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        **small,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    dit = DiTTransformer2DModel(**small, num_attention_heads=2, attention_head_dim=4, num_layers=2)
    for network, others, inside in (
        (unet, {"Conv2d", "ResnetBlock2D", "Downsample2D", "Upsample2D"}, 10),
        (dit, set(), 7),
    ):
        model = EpsilonModel(network.eval())
        traced = trace(model, (1, 8, 8), 100, condition_inputs_of(network))
        reasons = float_reasons(traced, "deploy")
        blocks, loose = find_blocks(traced, {layer.name for layer in traced.layers} - reasons.keys())
        kinds = {b.name: type(model.get_submodule(b.name)).__name__ for b in blocks}
        assert loose == []
        assert others <= set(kinds.values()) <= others | {"BasicTransformerBlock", "Linear"}
        assert {len(b.layers) for b in blocks if kinds[b.name] == "BasicTransformerBlock"} == {inside}
        assert all("transformer_blocks" not in name for name, kind in kinds.items() if kind == "Linear")


def test_a_layer_is_named_inside_its_block_unless_the_block_is_cut_out_of_the_network() -> None:
    block = Block(name="down.0", layers=("down.0.conv", "down.0.out"))
    assert (block.inner("down.0.conv"), block.key("down.0.conv")) == ("conv", "down.0.conv.weight"[7:])
    alone = Block(name="head", layers=("head",))
    assert (alone.inner("head"), alone.key("head")) == ("", "weight")
    cut_out = Block(name="(temporal)", layers=("time.0",), module=nn.Identity())
    assert (cut_out.inner("time.0"), cut_out.key("time.0")) == ("time.0", "time.0.weight")


@pytest.fixture
def recording() -> BlockIO:
    """Return 10 samples of a block called as (x, labels, scale=2.0)."""
    x = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0))
    leaves, spec = pytree.tree_flatten(((x, torch.arange(10)), {"scale": 2.0}))
    reference = (x + 1, torch.arange(10), 2.0)
    return BlockIO(inputs=tuple(leaves), batched=(True, True, False), spec=spec, target=x.sum(1), reference=reference)


def test_a_part_of_a_part_of_a_recording_has_the_samples_of_plain_indexing(recording: BlockIO) -> None:
    first, second, third = torch.tensor([9, 7, 5, 3]), torch.tensor([3, 1, 0]), torch.tensor([1, 2])
    rows = first[second][third]
    taken = recording.part(first).part(second).take(third)
    assert (len(recording.part(first)), len(taken)) == (4, 2)
    (x, labels), options = taken.call()
    assert torch.equal(x, recording.inputs[0][rows])
    assert labels.tolist() == rows.tolist()
    assert options == {"scale": 2.0}
    assert torch.equal(taken.target, recording.inputs[0][rows].sum(1))
    assert torch.equal(taken.reference[0], x + 1)


def test_single_samples_together_are_the_recording(recording: BlockIO) -> None:
    x, labels, scale = recording.inputs
    singles = [recording.single((x[i], labels[i], scale), recording.target[i]) for i in range(10)]
    assert torch.equal(torch.cat([s.inputs[0] for s in singles]), x)
    assert torch.equal(torch.cat([s.target for s in singles]), recording.target)
    assert {len(s) for s in singles} == {1}


def test_a_mixed_recording_has_elements_of_both_networks_and_leaves_integers_alone() -> None:
    x = torch.zeros(100, 100)
    leaves, spec = pytree.tree_flatten(((x, torch.arange(100)), {}))
    io = BlockIO(
        inputs=tuple(leaves),
        batched=(True, True),
        spec=spec,
        target=x,
        reference=(torch.ones_like(x), -torch.arange(100)),
    )
    mixed = io.mixed(0.25, torch.Generator().manual_seed(0)).inputs
    assert set(mixed[0].unique().tolist()) == {0.0, 1.0}
    assert float(mixed[0].mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(mixed[1], torch.arange(100))
    assert io.mixed(0.0, torch.Generator()) is io


def test_the_tensors_of_a_recording_can_be_put_back() -> None:
    leaves, spec = pytree.tree_flatten(((torch.ones(3, 2), None, torch.zeros(3)), {}))
    marked = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    io = BlockIO(inputs=tuple(leaves), batched=marked, spec=spec, target=torch.ones(3, 1), reference=tuple(leaves))
    other = io.with_tensors([tensor + 1 for tensor in io.tensors])
    assert [tensor.tolist() for tensor in other.tensors] == [(tensor + 1).tolist() for tensor in io.tensors]
    assert len(io.tensors) == 5
    alone = replace(io, reference=None)
    assert alone.with_tensors(alone.tensors).reference is None
