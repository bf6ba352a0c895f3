"""The table of known models: the architecture of each and how it is sampled, before any weights are loaded.

The architecture of a known model is written once, in `weights/<name>/config.json` and `scheduler_config.json`; the
weights themselves are beside it only for the bundled models.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.source import BUNDLED, MODULE, ORIGINAL, WeightSource

WEIGHTS = Path(__file__).resolve().parent / "weights"
# What `reduced` leaves of an architecture.
_MAX_DEPTH = 2  # transformers in a block
_MAX_HEADS = 2  # heads of an attention
_MIN_SIZE = 16  # height and width of an image or latent


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is known of a model before its weights are loaded.

    Attributes:
        name: What the user calls it.
        source: Where its weights are; for a hub repository without a commit, the newest is fetched and recorded.
        sampler: How its images are drawn unless the user says otherwise.
        config: Architecture, the fields of a diffusers config and its `_class_name`.
        scheduler: Noise schedule, the fields of a diffusers scheduler config.
        description: One line for a list of models.
        guidance: Scale of classifier-free guidance unless the user says otherwise; 1 is none.
        images: Calibration images of the preset "paper"; each gives one sample a step, with guidance two.
    """

    name: str
    source: WeightSource
    sampler: SamplerSpec
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    description: str
    guidance: float = 1.0
    images: int = 256


def _row(name: str, source: WeightSource, sampler: SamplerSpec, description: str, **more: Any) -> ModelSpec:
    def read(file: str) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((WEIGHTS / name / file).read_text(encoding="utf-8"))
        return fields

    return ModelSpec(
        name=name,
        source=source,
        sampler=sampler,
        config=read("config.json"),
        scheduler=read("scheduler_config.json"),
        description=description,
        **more,
    )


# Samplers, guidance and images as in the papers: latent diffusion (Rombach et al. 2022) as TFMQ-DM (arXiv 2311.16503)
# and GAC (arXiv 2602.01289) draw and calibrate it, Stable Diffusion as PCR (arXiv 2311.06322) does but with DDIM, and
# diffusion transformers as their authors do (Peebles and Xie 2023).
MODELS: dict[str, ModelSpec] = {
    row.name: row
    for row in (
        _row("ddpm-mnist", BUNDLED, SamplerSpec(steps=50), "MNIST digits, 32x32, 1.1 M parameters, bundled"),
        _row(
            "ddpm-mnist-labels",
            BUNDLED,
            SamplerSpec(name="ddim-clipped", steps=50),
            "MNIST digits by label, 32x32, 1.1 M parameters, bundled",
            guidance=3.0,
        ),
        _row(
            "ddpm-cifar10",
            WeightSource.hub("google/ddpm-cifar10-32", "267b167dc01f0e4e61923ea244e8b988f84deb80"),
            SamplerSpec(steps=100, spacing="quad"),
            "CIFAR-10, 32x32, 35.7 M parameters, from the Hugging Face hub",
        ),
        _row(
            "ddpm-church",
            WeightSource.hub("google/ddpm-church-256"),
            SamplerSpec(steps=100),
            "LSUN churches, 256x256, 113.7 M parameters, from the Hugging Face hub",
        ),
        _row(
            "ddpm-bedroom",
            WeightSource.hub("google/ddpm-bedroom-256"),
            SamplerSpec(steps=100),
            "LSUN bedrooms, 256x256, 113.7 M parameters, from the Hugging Face hub",
        ),
        _row(
            "ldm-celebahq-256",
            WeightSource.hub("CompVis/ldm-celebahq-256"),
            SamplerSpec(steps=200, spacing="from-1"),
            "CelebA-HQ, latents 3x64x64, 274.1 M parameters, from the Hugging Face hub",
        ),
        _row(
            "ldm-bedrooms",
            ORIGINAL,
            SamplerSpec(steps=200, eta=1.0, spacing="from-1"),
            "LSUN bedrooms (LDM-4), latents 3x64x64, 274.1 M parameters, from its original checkpoint",
        ),
        _row(
            "imagenet-ldm",
            ORIGINAL,
            SamplerSpec(steps=20, spacing="from-1"),
            "ImageNet classes (cin256-v2), latents 3x64x64, 401.4 M parameters, from its original checkpoint",
            guidance=3.0,
        ),
        _row(
            "sd15",
            WeightSource.hub("stable-diffusion-v1-5/stable-diffusion-v1-5"),
            SamplerSpec(steps=50, spacing="from-1"),
            "Stable Diffusion 1.5, latents 4x64x64, 859.5 M parameters, from the Hugging Face hub",
            guidance=7.5,
            images=200,
        ),
        _row(
            "sdxl",
            WeightSource.hub("stabilityai/stable-diffusion-xl-base-1.0"),
            SamplerSpec(steps=50, spacing="from-1"),
            "Stable Diffusion XL, latents 4x128x128, 2567.5 M parameters, from the Hugging Face hub",
            guidance=7.5,
            images=200,
        ),
        _row(
            "dit-xl-2-256",
            WeightSource.hub("facebook/DiT-XL-2-256"),
            SamplerSpec(name="ddpm", steps=250),
            "ImageNet classes (DiT-XL/2), latents 4x32x32, 749.8 M parameters, from the Hugging Face hub",
            guidance=1.5,
        ),
    )
}


def reduced(spec: ModelSpec, width: int = 16) -> ModelSpec:
    """Return a model of the same blocks, levels and inputs that is small enough for tests and trials.

    Args:
        spec: A row of `MODELS`.
        width: Channels of its first level, or of one head of a transformer; a multiple of 8.
    """
    config = dict(spec.config)
    if "block_out_channels" in config:
        config |= _reduced_unet(config, width)
    else:
        config |= {
            "sample_size": _MIN_SIZE,
            "num_attention_heads": _MAX_HEADS,
            "attention_head_dim": width,
            "num_layers": _MAX_DEPTH,
        }
    return replace(spec, source=MODULE, config=config, description=f"{spec.name} at reduced width")


def _reduced_unet(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the fields of a U-Net's config that change if its first level is to have `width` channels."""
    channels = config["block_out_channels"]
    unit = math.gcd(*channels)
    heads = config["attention_head_dim"]
    # The ratios of the levels stay as they are.
    channels = [width * c // unit for c in channels]
    fields: dict[str, Any] = {
        "block_out_channels": channels,
        "layers_per_block": 1,
        "norm_num_groups": width // 2,
        "sample_size": max(_MIN_SIZE, 2 ** len(channels)),  # the last level still has a pixel or two
    }
    if config["_class_name"] == "UNet2DModel":  # where the field is the width of a head
        fields["attention_head_dim"] = heads and width // 2
    else:  # where it is the number of heads, whatever its name says
        fields["attention_head_dim"] = (
            min(heads, _MAX_HEADS) if isinstance(heads, int) else [c // width for c in channels]
        )
    if "transformer_layers_per_block" in config:
        fields["transformer_layers_per_block"] = [min(n, _MAX_DEPTH) for n in config["transformer_layers_per_block"]]
    if "cross_attention_dim" in config:
        fields["cross_attention_dim"] = 2 * width
    if "addition_time_embed_dim" in config:
        fields |= {"addition_time_embed_dim": width, "projection_class_embeddings_input_dim": 8 * width}
    return fields
