"""Original checkpoints of latent diffusion: every tensor finds its place, and the network draws what it drew."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from gaq_export.errors import GaqError
from gaq_export.models import ldm_checkpoint
from gaq_export.models.diffusers_folder import build_network, fingerprint
from gaq_export.models.loader import LoadedModel, load_model, random_model
from gaq_export.models.registry import MODELS, reduced


def small(name: str) -> LoadedModel:
    return random_model(replace(reduced(MODELS[name]), config=dict(reduced(MODELS[name]).config) | {"sample_size": 8}))


def as_published(model: LoadedModel, prefix: str = ldm_checkpoint.NETWORK) -> dict[str, Tensor]:
    """Return the weights as latent diffusion's authors name and lay them out."""
    state, heads = {}, {}
    for name, original in ldm_checkpoint.original_names(model.module).items():
        value = model.module.state_dict()[name]
        if original.rpartition(".")[0].endswith("qkv"):
            width = model.spec.config["attention_head_dim"]
            heads.setdefault(original, []).append(value.unflatten(0, (-1, 1, width)))  # (heads, 1, width, ...)
        elif "middle_block.1.proj_out" in original and original.endswith("weight"):
            state[prefix + original] = value[..., None] if value.ndim == 2 else value  # a convolution of one axis
        else:
            state[prefix + original] = value
    for original, parts in heads.items():
        whole = torch.cat(parts, 1).flatten(0, 2)
        state[prefix + original] = whole[..., None] if original.endswith("weight") else whole
    if model.spec.name == "imagenet-ldm":
        state[ldm_checkpoint.TABLE] = model.module.state_dict()["class_table.weight"]
    return state


def write(model: LoadedModel, file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "config.json").write_text(json.dumps(model.spec.config))
    torch.save(content, file)
    return file


@pytest.mark.parametrize("name", ["ldm-bedrooms", "imagenet-ldm"])
def test_a_network_written_as_its_authors_do_loads_and_predicts_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    model = small(name)
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "betas": torch.zeros(1)}
    file = write(model, tmp_path / "model.ckpt", {"state_dict": as_published(model) | others, "epoch": 3})
    for weights in (file, tmp_path):
        loaded = load_model(name, weights)
        assert (loaded.fingerprint, loaded.random_weights, str(loaded.source)) == (
            model.fingerprint,
            False,
            str(weights),
        )
    assert loaded.spec.sampler == MODELS[name].sampler
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2  # as their configs say
    assert torch.allclose(loaded.schedule.alpha_bar, (1 - betas).cumprod(0), rtol=1e-4)
    assert loaded.schedule.clip is None
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    conditioning = {} if name == "ldm-bedrooms" else {"class_labels": torch.tensor([7, 1000])}
    with torch.no_grad():
        assert torch.equal(loaded.network(x, t, conditioning), model.network(x, t, conditioning))
    if conditioning:
        rows = model.module.class_table.weight[[7, 1000]][:, None]
        with torch.no_grad():
            assert torch.equal(model.network(x, t, conditioning), model.module(x, t, encoder_hidden_states=rows).sample)


def test_the_map_covers_every_tensor_of_the_published_networks_and_diffusers_reads_it_likewise() -> None:
    tensors = {"ldm-bedrooms": 368, "imagenet-ldm": 688, "sd15": 686, "sdxl": 1680}
    for name, count in tensors.items():
        with torch.device("meta"):
            network = build_network(MODELS[name].config, name)
        names = ldm_checkpoint.original_names(network)
        assert set(names) == set(network.state_dict()) - {"class_table.weight"}
        assert len(set(names.values())) == count
        if name != "ldm-bedrooms":  # whose q, k and v in one diffusers cannot read
            state = {f"model.diffusion_model.{original}": ours for ours, original in names.items()}
            read = convert_ldm_unet_checkpoint(state, dict(network.config))
            assert dict(read) == {ours: ours for ours in names}


def test_the_moving_average_is_what_draws(tmp_path: Path) -> None:
    model, other = small("ldm-bedrooms"), random_model(small("ldm-bedrooms").spec, seed=1)
    average = {ldm_checkpoint.AVERAGE + k.replace(".", ""): v for k, v in as_published(model, "").items()}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    file = write(model, tmp_path / "model.ckpt", as_published(other) | average | counts)
    assert load_model("ldm-bedrooms", file).fingerprint == fingerprint(model.module)


def test_stable_diffusions_single_file_is_read_too(tmp_path: Path) -> None:
    model = small("sd15")
    (tmp_path / "config.json").write_text(json.dumps(model.spec.config))
    save_file(as_published(model), tmp_path / "v1-5.safetensors")
    assert load_model("sd15", tmp_path / "v1-5.safetensors").fingerprint == model.fingerprint


def test_a_trainers_notes_do_not_keep_the_weights_from_being_read_but_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model = ModuleType("pytorch_lightning.callbacks"), small("ldm-bedrooms")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    notes = {"callbacks": {kind: {"best_model_score": torch.tensor(0.1)}}}
    file = write(model, tmp_path / "model.ckpt", {"state_dict": as_published(model)} | notes)
    evil = write(model, tmp_path / "evil" / "model.ckpt", {"state_dict": {"x": sys.exit}})
    monkeypatch.undo()
    assert load_model("ldm-bedrooms", file).fingerprint == model.fingerprint
    with pytest.raises(GaqError, match=r"hold more than tensors \(sys.exit\), which could run code"):
        load_model("ldm-bedrooms", evil)


def test_a_single_file_that_was_cut_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small("sd15").spec.config))
    file = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4000)}, file)
    whole = file.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(GaqError, match=r"The weights .*v1-5\.safetensors are damaged .*\. Copy them again"):
            load_model("sd15", file)


def test_what_is_wrong_with_an_original_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    model = small("ldm-bedrooms")
    state = as_published(model)
    gone = "model.diffusion_model.middle_block.1.qkv.weight"
    file = write(model, tmp_path / "a" / "model.ckpt", {k: v for k, v in state.items() if k != gone})
    with pytest.raises(GaqError, match=r"3 tensors missing \[mid_block.attentions.0.to_k.weight, .*\], 0 unexpected"):
        load_model("ldm-bedrooms", file)
    file = write(model, tmp_path / "b" / "model.ckpt", state | {gone: torch.zeros(7)})
    with pytest.raises(GaqError, match=r"has shape \(7,\)"):
        load_model("ldm-bedrooms", file)
    file = write(model, tmp_path / "c" / "model.ckpt", {"conv_in.weight": torch.zeros(1)})
    with pytest.raises(GaqError, match=r"holds no model.diffusion_model.\*"):
        load_model("ldm-bedrooms", file)
    (file.parent / "config.json").unlink()
    with pytest.raises(GaqError, match=r"No model was named.*'imagenet-ldm'"):
        load_model(None, file)
    with pytest.raises(GaqError, match=r"'imagenet-ldm' are published only as .*model.ckpt.*--weights random"):
        load_model("imagenet-ldm")
