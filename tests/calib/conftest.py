"""Conditional networks, small enough to run in milliseconds, for the tests of calibration."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.data import CalibrationSet
from gaq_export.models.architectures import EpsilonModel

STEPS = torch.arange(4).repeat_interleave(4)


def _class_unet() -> nn.Module:
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


def _text_unet() -> nn.Module:
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


def _transformer() -> nn.Module:
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


def _samples(**cond: Tensor) -> CalibrationSet:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return CalibrationSet(x=x, t=90 - 20 * STEPS, step=STEPS, cond=cond)


LABELS = torch.arange(16) % 10
STATES = torch.randn(16, 5, 12, generator=torch.Generator().manual_seed(3))
NETWORKS = {
    "classes": (_class_unet, {"class_labels": LABELS}),
    "text": (_text_unet, {"encoder_hidden_states": STATES}),
    "transformer": (_transformer, {"class_labels": LABELS}),
}


@pytest.fixture(params=NETWORKS)
def conditional(request: pytest.FixtureRequest) -> tuple[EpsilonModel, CalibrationSet]:
    """Return a conditional network, of every kind in turn, and 16 samples of four steps with conditions that fit it."""
    make, cond = NETWORKS[request.param]
    return EpsilonModel(make().eval()), _samples(**cond)


@pytest.fixture
def class_conditional() -> tuple[EpsilonModel, CalibrationSet]:
    """Return a network of classes, and samples with their labels."""
    return EpsilonModel(_class_unet().eval()), _samples(class_labels=LABELS)
