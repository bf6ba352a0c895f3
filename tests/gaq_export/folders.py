"""Pipeline folders small enough to run in milliseconds: decoders of latents, and text encoders."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

SIZE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
}
LENGTH, END = 12, "<|endoftext|>"


def autoencoder(kind: type[nn.Module], **further: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = kind(**SIZE, **further).eval()
        if kind is VQModel:  # the codes that it starts with are all nearly the same
            nn.init.normal_(made.quantize.embedding.weight)
    return made


KINDS = {
    "vae": lambda: autoencoder(AutoencoderKL, scaling_factor=0.5),
    "vqvae": lambda: autoencoder(VQModel, num_vq_embeddings=32, scaling_factor=0.7),
}


def write_latent_pipelines(make_folder: Callable[[str], Path]) -> dict[str, Path]:
    """Write a pipeline with each kind of decoder, a tiny U-Net of 8x8 latents, and a scheduler that does not clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            norm_num_groups=4,
        ).eval()
    made = {}
    for place, make in KINDS.items():
        made[place] = make_folder(place)
        unet.save_pretrained(made[place] / "unet")
        make().save_pretrained(made[place] / place)
        scheduler = DDIMScheduler(num_train_timesteps=100, beta_end=0.2, clip_sample=False, steps_offset=0)
        scheduler.save_pretrained(made[place] / "scheduler")
    return made


def write_tokenizer(folder: Path, pad: str) -> int:
    """Write a tokenizer of single letters as the hub has them, and return how many words it knows."""
    folder.mkdir(parents=True)
    letters = [*string.ascii_lowercase, ",", "!"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", END]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH})
    )
    return len(words)


def make_encoder(kind: str, words: int, width: int, seed: int, end: int) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=10,
        bos_token_id=words - 2,
        eos_token_id=end,
        pad_token_id=words - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, kind)(config).eval()
        for value in model.parameters():  # otherwise all biases are 0
            nn.init.normal_(value, std=0.3)
    return model


def write_text_pipeline(folder: Path, *, pair: bool) -> Path:
    """Write a pipeline folder of one text encoder, or of two as Stable Diffusion XL has them, and return it."""
    words = write_tokenizer(folder / "tokenizer", END)
    make_encoder("CLIPTextModel", words, 16, 1, words - 1 if pair else 2).save_pretrained(folder / "text_encoder")
    if pair:
        write_tokenizer(folder / "tokenizer_2", "!")
        second = make_encoder("CLIPTextModelWithProjection", words, 12, 2, 2)
        second.save_pretrained(folder / "text_encoder_2")
    further = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if pair else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # or its weights, and how close an engine comes, would depend on the tests before
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=28 if pair else 16,
            projection_class_embeddings_input_dim=34 if pair else None,
            **further,
        )
        unet.save_pretrained(folder / "unet")
        AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
                      up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(folder / "vae")  # fmt: skip
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder
