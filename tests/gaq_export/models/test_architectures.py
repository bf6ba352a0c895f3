from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from gaq_export.errors import GaqError
from gaq_export.models.architectures import (
    ClassUNet,
    EpsilonModel,
    as_denoiser,
    class_rows,
    condition_inputs_of,
    config_of,
)
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import load_model
from gaq_export.models.weight_files import SAFETENSORS

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT_BLOCKS = {
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
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, tuple[int, ...]]]] = {
    "classes": (
        lambda: UNet2DModel(
            **SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=11
        ),
        "unet",
        {"class_labels": (1,)},
    ),
    "text": (lambda: UNet2DConditionModel(**SMALL, **TEXT_BLOCKS), "unet", SHAPES),
    "xl": (
        lambda: UNet2DConditionModel(**SMALL, **TEXT_BLOCKS, **XL),
        "unet",
        SHAPES | {"text_embeds": (1, 20), "time_ids": (1, 6)},
    ),
    "class rows": (lambda: ClassUNet(classes=11, **SMALL, **TEXT_BLOCKS), "unet", {"class_labels": (1,)}),
    "transformer": (lambda: DiTTransformer2DModel(**TRANSFORMER), "transformer", {"class_labels": (1,)}),
}


@pytest.fixture(params=NETWORKS)
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, nn.Module, dict[str, tuple[int, ...]]]:
    """A pipeline's folder, the network's folder in it, the network, and the shapes of its condition."""
    make, place, shapes = NETWORKS[request.param]
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(tmp_path / "pipe" / place)
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "pipe" / "scheduler")
    return tmp_path / "pipe", tmp_path / "pipe" / place, network, shapes


def test_every_kind_of_network_comes_out_of_a_pipelines_folder_as_it_went_in(pipe) -> None:
    folder, inside, network, shapes = pipe
    model = load_model(weights=folder)
    assert type(model.module) is type(network)
    assert (model.shape, model.fingerprint, model.schedule.clip) == ((1, 8, 8), fingerprint(network), None)
    assert {name: tuple(row.shape) for name, row in model.condition_inputs.items()} == shapes
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    rows = {name: row.expand(2, *row.shape[1:]) for name, row in model.condition_inputs.items()}
    with torch.no_grad():
        assert model.network(x, t, rows).shape == x.shape
    state = load_file(inside / SAFETENSORS)
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, inside / SAFETENSORS)
    with pytest.raises(GaqError, match=rf"1 tensors missing \[{name}\]"):
        load_model(weights=folder)


def test_a_learned_variance_is_cut_off() -> None:
    network = NETWORKS["transformer"][0]().eval()
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), {"class_labels": torch.tensor([1, 10])}
    with torch.no_grad():
        whole = network(x, timestep=t, class_labels=condition["class_labels"]).sample
        epsilon = as_denoiser(network)(x, t, condition)
    assert (whole.shape[1], epsilon.shape[1]) == (2, 1)
    assert torch.equal(epsilon, whole[:, :1])


def test_a_class_of_the_table_draws_as_its_row_given_as_a_text() -> None:
    network = NETWORKS["class rows"][0]().eval()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([4, 10])
    with torch.no_grad():
        by_label = as_denoiser(network)(x, t, {"class_labels": labels})
        by_row = UNet2DConditionModel.forward(network, x, t, network.class_table.weight[labels][:, None]).sample
    assert torch.equal(by_label, by_row)


def test_the_rows_of_classes_are_counted_with_the_unconditional_one() -> None:
    counts = {name: class_rows(make()) for name, (make, _, _) in NETWORKS.items()}
    assert counts == {"classes": 11, "text": None, "xl": None, "class rows": 11, "transformer": 11}


def test_any_other_module_is_a_denoiser_as_it_is() -> None:
    module = nn.Conv2d(1, 1, 1)
    assert as_denoiser(module) is module
    assert (condition_inputs_of(module), class_rows(module), config_of(module)) == ({}, None, {})


def test_layers_keep_the_names_that_plans_use() -> None:
    network = NETWORKS["transformer"][0]()
    names = dict(as_denoiser(network).named_modules())
    assert names["unet.transformer_blocks.0.attn1.to_q"] is network.transformer_blocks[0].attn1.to_q


def test_a_unet_becomes_a_denoiser_and_a_plain_module_stays_itself(tiny_unet: UNet2DModel) -> None:
    x, t = torch.zeros(2, 1, 16, 16), torch.tensor([3, 70])
    denoiser = as_denoiser(tiny_unet)
    assert isinstance(denoiser, EpsilonModel)
    assert torch.equal(denoiser(x, t), tiny_unet(x, t).sample)
    assert as_denoiser(denoiser) is denoiser
