"""What is quantized, what stays float and why, and where blocks begin, in networks of several kinds."""

import pytest
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.blocks import find_blocks
from calib.config import QuantConfig
from calib.errors import CalibError
from calib.float_layers import float_reasons
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel, condition_inputs_of


def test_a_foreign_network_is_taken_by_structure_and_says_what_stays_float(make_foreign) -> None:
    found = trace(make_foreign(), (1, 8, 8), 100)
    reasons = float_reasons(found, "deploy")
    assert reasons == {
        "enter": "first layer",
        "leave": "last layer",
        "time.0": "depends on the step alone (temporal table)",
        "time.2": "depends on the step alone (temporal table)",
        "up": "ConvTranspose2d has no quantized form here",
        "attention.out_proj": "its weight is used without calling it as a module",
    }
    blocks, loose = find_blocks(found, {layer.name for layer in found.layers} - reasons.keys())
    assert [(b.name, b.layers) for b in blocks] == [
        ("down", ("down",)),
        ("gate", ("gate",)),
        ("mlp", ("mlp.0", "mlp.2")),
    ]
    assert loose == ["shared"]


def test_a_diffusers_unet_is_cut_into_residual_and_attention_blocks(tiny_unet: UNet2DModel) -> None:
    found = trace(EpsilonModel(tiny_unet), (1, 16, 16), 100)
    reasons = float_reasons(found, "deploy")
    assert {n.removeprefix("unet.") for n, why in reasons.items() if "layer" in why} == {"conv_in", "conv_out"}
    assert all("time_emb" in n for n, why in reasons.items() if "step alone" in why)
    blocks, loose = find_blocks(found, {layer.name for layer in found.layers} - reasons.keys())
    assert loose == []
    kinds = [type(EpsilonModel(tiny_unet).get_submodule(b.name)).__name__ for b in blocks]
    assert set(kinds) == {"ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}
    assert sum(len(b.layers) for b in blocks) == len(found.layers) - len(reasons)


def test_transformers_are_cut_into_their_blocks_whether_they_are_told_a_text_or_a_class() -> None:
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
        found = trace(model, (1, 8, 8), 100, condition_inputs_of(network))
        reasons = float_reasons(found, "deploy")
        blocks, loose = find_blocks(found, {layer.name for layer in found.layers} - reasons.keys())
        kinds = {b.name: type(model.get_submodule(b.name)).__name__ for b in blocks}
        assert loose == []
        assert others <= set(kinds.values()) <= others | {"BasicTransformerBlock", "Linear"}
        assert {len(b.layers) for b in blocks if kinds[b.name] == "BasicTransformerBlock"} == {inside}
        assert all("transformer_blocks" not in name for name, kind in kinds.items() if kind == "Linear")


def test_the_tfmq_convention_keeps_shortcuts_and_down_sampling_and_quantizes_embeddings(tiny_unet: UNet2DModel) -> None:
    found = trace(EpsilonModel(tiny_unet), (1, 16, 16), 100)
    reasons = float_reasons(found, "tfmq")
    names = {n.removeprefix("unet.") for n in reasons}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= names
    assert "time_embedding.linear_2" not in names
    assert all("shortcut" in n or "downsampl" in n for n in names - {"conv_in", "conv_out", "time_embedding.linear_1"})


def test_what_is_asked_to_stay_float_stays_float(make_foreign) -> None:
    found = trace(make_foreign(), (1, 8, 8), 100)
    assert float_reasons(found, "deploy", ("mlp.*",))["mlp.0"] == "asked for by 'mlp.*'"
    with pytest.raises(CalibError, match=r"'nothing\*' matches no layer"):
        float_reasons(found, "deploy", ("nothing*",))
    with pytest.raises(CalibError, match="No layer is left to quantize"):
        float_reasons(found, "deploy", ("*",))
    with pytest.raises(CalibError, match=r"Unknown convention 'x'. Choose one of \['deploy', 'tfmq'\]"):
        QuantConfig(convention="x")


def test_a_network_with_another_output_shape_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x[:, :, 1:]

    with pytest.raises(CalibError, match=r"input's shape \(3, 1, 8, 8\); found \(3, 1, 7, 8\)"):
        trace(Wrong(), (1, 8, 8), 100)
