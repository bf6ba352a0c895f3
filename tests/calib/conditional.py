"""Conditional networks, small enough to run in milliseconds, for the tests of calibration."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.data import CalibrationSet

STEPS = torch.arange(4).repeat_interleave(4)


def class_unet() -> nn.Module:
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


def text_unet() -> nn.Module:
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


def samples(**cond: Tensor) -> CalibrationSet:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return CalibrationSet(x=x, t=90 - 20 * STEPS, step=STEPS, cond=cond)


LABELS = torch.arange(16) % 10
STATES = torch.randn(16, 5, 12, generator=torch.Generator().manual_seed(3))
NETWORKS = {
    "classes": (class_unet, {"class_labels": LABELS}),
    "text": (text_unet, {"encoder_hidden_states": STATES}),
    "transformer": (transformer, {"class_labels": LABELS}),
}


def short(**more: object) -> QuantConfig:
    """Return settings for networks of several blocks: few iterations."""
    return QuantConfig(
        weight=WeightConfig(bits=4),
        activation=ActivationConfig(batch=8),
        reconstruction=ReconstructionConfig(iterations=3, batch=4, learning_rate=1e-2),
        omega=OmegaConfig(rule="gac", meta_steps=1, batch=4, validation_batch=2),
        micro_batch=4,
        **more,
    )
