"""Folders of every kind of network: told what they say they are told, the weights as they were, refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PNDMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from gaq_export.errors import GaqError
from gaq_export.models.architectures import ClassUNet
from gaq_export.models.diffusers_folder import HALF, INDEX, SAFETENSORS, fingerprint
from gaq_export.models.loader import load_model

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TOLD_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 1,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 44,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}
SHAPES = {"encoder_hidden_states": (1, 77, 12)}
MADE: dict[str, tuple[Callable[[], nn.Module], str, dict[str, tuple[int, ...]]]] = {
    "classes": (
        lambda: UNet2DModel(
            **SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=11
        ),
        "unet",
        {"class_labels": (1,)},
    ),
    "text": (lambda: UNet2DConditionModel(**SMALL, **TOLD_BLOCKS), "unet", SHAPES),
    "xl": (
        lambda: UNet2DConditionModel(**SMALL, **TOLD_BLOCKS, **XL),
        "unet",
        SHAPES | {"text_embeds": (1, 20), "time_ids": (1, 6)},
    ),
    "class rows": (lambda: ClassUNet(classes=11, **SMALL, **TOLD_BLOCKS), "unet", {"class_labels": (1,)}),
    "transformer": (lambda: DiTTransformer2DModel(**TRANSFORMER), "transformer", {"class_labels": (1,)}),
}


@pytest.fixture(params=MADE)
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, nn.Module, dict[str, tuple[int, ...]]]:
    """A pipeline's folder, where the network lies in it, the network, and the shapes of what it is told."""
    make, place, conditioning = MADE[request.param]
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(tmp_path / "pipe" / place)
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "pipe" / "scheduler")
    return tmp_path / "pipe", tmp_path / "pipe" / place, network, conditioning


def test_every_kind_of_network_comes_out_of_a_pipelines_folder_as_it_went_in(pipe) -> None:
    folder, inside, network, conditioning = pipe
    model = load_model(weights=folder)
    assert type(model.module) is type(network)
    assert (model.shape, model.fingerprint, model.schedule.clip) == ((1, 8, 8), fingerprint(network), None)
    assert {name: tuple(row.shape) for name, row in model.condition_inputs.items()} == conditioning
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    rows = {name: row.expand(2, *row.shape[1:]) for name, row in model.condition_inputs.items()}
    with torch.no_grad():
        assert model.network(x, t, rows).shape == x.shape
    state = load_file(inside / SAFETENSORS)
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, inside / SAFETENSORS)
    with pytest.raises(GaqError, match=rf"1 tensors missing \[{name}\]"):
        load_model(weights=folder)


def test_weights_in_several_files_and_in_halves_are_found(tmp_path: Path) -> None:
    network = MADE["text"][0]()
    network.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    network.save_pretrained(tmp_path / "half")
    DDIMScheduler().save_pretrained(tmp_path / "parts" / "scheduler")
    DDIMScheduler().save_pretrained(tmp_path / "half" / "scheduler")
    (tmp_path / "half" / SAFETENSORS).rename(tmp_path / "half" / HALF)
    assert not (tmp_path / "parts" / SAFETENSORS).exists()
    assert load_model(weights=tmp_path / "parts").fingerprint == fingerprint(network)
    assert load_model(weights=tmp_path / "half").fingerprint == fingerprint(network)
    lost = sorted((tmp_path / "parts").glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(GaqError, match=f"{lost.name} is needed"):
        load_model(weights=tmp_path / "parts")
    (tmp_path / "parts" / INDEX).write_text("{}")
    with pytest.raises(GaqError, match=r"index of weights .* cannot be read"):
        load_model(weights=tmp_path / "parts")


def test_the_class_that_diffusion_transformers_had_before_is_known(tmp_path: Path) -> None:
    network = MADE["transformer"][0]()
    network.save_pretrained(tmp_path)
    DDIMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    file.write_text(json.dumps(config))
    assert load_model(weights=tmp_path).fingerprint == fingerprint(network)


def test_what_a_sampler_cannot_drive_is_refused_in_one_line(tmp_path: Path) -> None:
    MADE["text"][0]().save_pretrained(tmp_path)
    PNDMScheduler().save_pretrained(tmp_path)
    assert load_model(weights=tmp_path).schedule.clip is None  # a scheduler that never clips
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"time_cond_proj_dim": 8}, r"time_cond_proj_dim 8; supported is only \[None\]"),
        ({"cross_attention_dim": [12, 12]}, "several widths of texts"),
        ({"in_channels": 9, "out_channels": 4}, "turns 9 channels into 4"),
        ({"sample_size": None}, "has no sample_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(GaqError, match=message):
            load_model(weights=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    PNDMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    with pytest.raises(GaqError, match="'v_prediction'; only models that predict noise"):
        load_model(weights=tmp_path)
