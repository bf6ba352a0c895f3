import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from gaq_export.errors import GaqError
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import load_model
from gaq_export.models.weight_files import DIFFUSERS, SAFETENSORS

INDEX, PICKLE = f"{SAFETENSORS}.index.json", DIFFUSERS.pickle
HALF = f"{DIFFUSERS.stem}.fp16.safetensors"


def test_a_pipeline_folder_is_read_from_its_subfolders(tiny_unet: UNet2DModel, tmp_path: Path) -> None:
    tiny_unet.save_pretrained(tmp_path / "pipe" / "unet")
    DDPMScheduler(num_train_timesteps=40, beta_end=0.5).save_pretrained(tmp_path / "pipe" / "scheduler")
    model = load_model(weights=tmp_path / "pipe")
    assert (model.spec.name, model.schedule.num_train) == ("pipe", 40)


def test_half_precision_weights_become_float32(tiny_folder: Path) -> None:
    _rewrite(tiny_folder, lambda state: {name: value.half() for name, value in state.items()})
    assert {p.dtype for p in load_model(weights=tiny_folder).module.parameters()} == {torch.float32}


def test_a_fingerprint_is_the_hash_of_names_shapes_and_bytes() -> None:
    layer = torch.nn.Linear(2, 1)
    state = {name: value.detach().numpy().tobytes() for name, value in layer.state_dict().items()}
    expected = hashlib.sha256(b"bias(1,)" + state["bias"] + b"weight(1, 2)" + state["weight"]).hexdigest()
    assert fingerprint(layer) == expected
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert fingerprint(layer) != expected


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / SAFETENSORS)), folder / SAFETENSORS)


def _config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _truncate(folder: Path) -> None:
    data = (folder / SAFETENSORS).read_bytes()
    (folder / SAFETENSORS).write_bytes(data[: len(data) // 2])


def _only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / SAFETENSORS), folder / PICKLE)
    (folder / SAFETENSORS).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, not a list"),
    "wrong class": (
        lambda f: _config(f, _class_name="VQModel"),
        "a 'VQModel'; supported are .*'UNet2DModel'",
    ),
    "odd block": (lambda f: _config(f, down_block_types=["Down", "Down"]), "cannot build the architecture"),
    "odd type": (lambda f: _config(f, block_out_channels="wide"), "block_out_channels is 'wide', expected a whole"),
    "odd groups": (lambda f: _config(f, norm_num_groups=7), "cannot build the architecture"),
    "times for classes": (lambda f: _config(f, class_embed_type="timestep"), r"class_embed_type 'timestep'.*\[None\]"),
    "odd channels": (lambda f: _config(f, out_channels=3), "turns 1 channels into 3"),
    "no size": (lambda f: _config(f, sample_size=None), "has no sample_size"),
    "no weights": (lambda f: (f / SAFETENSORS).unlink(), "has no weights beside its config.json"),
    "only a pickle": (_only_pickle, "are a pickle.*save_pretrained"),
    "truncated": (_truncate, "are damaged"),
    "not safetensors": (lambda f: (f / SAFETENSORS).write_bytes(b"version https://git-lfs"), "are damaged"),
    "missing": (
        lambda f: _rewrite(f, lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}),
        r"1 tensors missing \[conv_in.bias\], 0 unexpected \[\]",
    ),
    "unexpected": (
        lambda f: _rewrite(f, lambda s: s | {f"extra.{i}": torch.zeros(1) for i in range(5)}),
        r"0 tensors missing \[\], 5 unexpected \[extra.0, extra.1, extra.2, \.\.\.\]",
    ),
    "shape": (
        lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.zeros(7)}),
        r"'conv_in.bias' .* shape \(7,\), .* asks for \(16,\)",
    ),
    "integers": (
        lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.zeros(16, dtype=torch.int32)}),
        "is torch.int32",
    ),
    "nan": (lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.full((16,), torch.nan)}), "'conv_in.bias'.*NaN"),
    "no scheduler": (lambda f: (f / "scheduler_config.json").unlink(), "has no scheduler_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tiny_folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(tiny_folder)
    with pytest.raises(GaqError, match=message) as caught:
        load_model(weights=tiny_folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"There is no model folder .*gone"):
        load_model(weights=tmp_path / "gone")


def text_network() -> UNet2DConditionModel:
    """Return a tiny network that takes texts."""
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


def test_weights_in_several_files_and_in_half_precision_are_read(tmp_path: Path) -> None:
    network = text_network()
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
    with pytest.raises(GaqError, match=r"The index of weights .* is not valid: weight_map is missing"):
        load_model(weights=tmp_path / "parts")


def test_the_class_that_diffusion_transformers_had_before_is_known(tmp_path: Path) -> None:
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    network.save_pretrained(tmp_path)
    DDIMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    file.write_text(json.dumps(config))
    assert load_model(weights=tmp_path).fingerprint == fingerprint(network)


def test_what_a_sampler_cannot_drive_is_refused_in_one_line(tmp_path: Path) -> None:
    text_network().save_pretrained(tmp_path)
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
