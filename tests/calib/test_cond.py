"""Networks that are told what to draw: what they are told reaches every stage, and does not pass for the step."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.cost import layer_macs
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel

STEPS = torch.arange(4).repeat_interleave(4)


def classes() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


def text() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def data(**cond: Tensor) -> CalibrationSet:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return CalibrationSet(x=x, t=90 - 20 * STEPS, step=STEPS, cond=cond)


LABELS = torch.arange(16) % 10
STATES = torch.randn(16, 5, 12, generator=torch.Generator().manual_seed(3))
NETWORKS = {
    "classes": (classes, {"class_labels": LABELS}),
    "text": (text, {"encoder_hidden_states": STATES}),
    "transformer": (transformer, {"class_labels": LABELS}),
}


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[EpsilonModel, CalibrationSet]:
    make, cond = NETWORKS[request.param]
    return EpsilonModel(make().eval()), data(**cond)


def config(**more: object) -> QuantConfig:
    return QuantConfig(
        weight=WeightConfig(bits=4),
        activation=ActivationConfig(batch=8),
        reconstruction=ReconstructionConfig(iterations=3, batch=4, learning_rate=1e-2),
        omega=OmegaConfig(rule="gac", meta_steps=1, batch=4, validation_batch=2),
        micro_batch=4,
        **more,
    )


def test_what_is_told_goes_where_its_samples_go() -> None:
    held = data(class_labels=LABELS)
    part = held.take(torch.tensor([3, 12]))
    assert part.cond["class_labels"].tolist() == [3, 2]
    x, t, cond = part.inputs(slice(1))
    assert (x.shape, t.tolist(), cond["class_labels"].tolist()) == ((1, 1, 8, 8), [90], [3])
    assert len(data().inputs()) == 2


def test_a_network_is_calibrated_on_what_it_is_told(case: tuple[EpsilonModel, CalibrationSet]) -> None:
    network, held = case
    plan = calibrate(network, held, config(), timesteps=100)
    assert len(plan.layers) > 8
    other = {name: value.flip(0) for name, value in held.cond.items()}
    odd = calibrate(network, CalibrationSet(x=held.x, t=held.t, step=held.step, cond=other), config(), timesteps=100)
    assert any(plan.layers[name].input != odd.layers[name].input for name in plan.layers)
    with torch.no_grad():
        exact, found = (net(*held.inputs()) for net in (network, fake_quantized(network, plan)))
    assert 0 < float((exact - found).square().sum() / exact.square().sum()) < 0.1


def test_a_label_does_not_pass_for_the_step() -> None:
    network, held = EpsilonModel(classes().eval()), data(class_labels=LABELS)
    found = {layer.name: layer for layer in trace(network, (1, 8, 8), 100, held.cond).layers}
    steps = [name for name, layer in found.items() if layer.by_step]
    assert steps == ["unet.time_embedding.linear_1", "unet.time_embedding.linear_2"]
    for name in ("unet.down_blocks.0.resnets.0.time_emb_proj", "unet.class_embedding"):
        assert not found[name].depends_on_x
    assert found["unet.class_embedding"].kind == "Embedding"
    plan = calibrate(network, held, config(convention="tfmq"), timesteps=100)
    (temporal,) = (block for block in plan.blocks if block.name == "(temporal)")
    assert temporal.layers == ("unet.time_embedding.linear_2",)  # the first stays float
    ends = {name for name, reason in plan.float_layers.items() if reason in ("first layer", "last layer")}
    assert ends == {"unet.conv_in", "unet.conv_out"}


def test_multiplications_are_counted(case: tuple[EpsilonModel, CalibrationSet]) -> None:
    network, held = case
    macs = layer_macs(network, (1, 8, 8), 100, held.cond)
    assert all(macs.values())
