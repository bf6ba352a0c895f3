"""Weights are found under all the names that they have in folders, and read whole, checked, from inside the folder."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from gaq_export.errors import GaqError
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import load_model
from gaq_export.models.weight_files import DIFFUSERS, SAFETENSORS, TRANSFORMERS, Naming

INDEX = f"{SAFETENSORS}.index.json"


def split(folder: Path, index: str, part: str) -> None:
    """Move the weights of a folder into two files and an index of them."""
    state = load_file(folder / SAFETENSORS)
    (folder / SAFETENSORS).unlink()
    names = sorted(state)
    weight_map = {}
    for k, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = part.format(f"-0000{k}-of-00002")
        save_file({name: state[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


STEM = DIFFUSERS.stem
VARIANTS: dict[str, Callable[[Path], object]] = {
    "fp16": lambda f: (f / SAFETENSORS).rename(f / f"{STEM}.fp16.safetensors"),
    "bf16": lambda f: (f / SAFETENSORS).rename(f / f"{STEM}.bf16.safetensors"),
    "non_ema": lambda f: (f / SAFETENSORS).rename(f / f"{STEM}.non_ema.safetensors"),
    "shards": lambda f: split(f, INDEX, STEM + "{}.safetensors"),
    "fp16 shards": lambda f: split(f, f"{INDEX[:-5]}.fp16.json", STEM + ".fp16{}.safetensors"),
    "older fp16 shards": lambda f: split(f, f"{STEM}.fp16.safetensors.index.json", STEM + "{}.fp16.safetensors"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_read_under_every_name_that_they_have(
    variant: str, tiny_folder: Path, tiny_unet: UNet2DModel, caplog: pytest.LogCaptureFixture
) -> None:
    VARIANTS[variant](tiny_folder)
    assert load_model(weights=tiny_folder).fingerprint == fingerprint(tiny_unet)
    assert ("of the variant 'non_ema', which are read" in caplog.text) == (variant == "non_ema")
    names = [path.name for path in tiny_folder.iterdir()]
    weights = {name for name in names if "safetensors" in name}
    assert set(DIFFUSERS.files(names)) == weights  # what is fetched from the hub


@pytest.mark.parametrize("naming", [DIFFUSERS, TRANSFORMERS])
def test_full_precision_in_one_file_comes_first_and_a_pickle_last(naming: Naming) -> None:
    whole, stem = f"{naming.stem}.safetensors", naming.stem
    order = [whole, f"{whole}.index.json", f"{stem}.fp16.safetensors", f"{whole}.index.fp16.json"]
    order += [f"{stem}.bf16.safetensors", f"{stem}.non_ema.safetensors", naming.pickle]
    for k in range(len(order)):
        assert naming.preferred(reversed(order[k:])) == order[k]
    assert naming.preferred(["config.json", f"{stem}-00001-of-00002.safetensors", f"{stem}.msgpack"]) is None
    assert naming.files(["config.json"]) == []


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(value) for name, value in load_file(folder / SAFETENSORS).items()}, folder / SAFETENSORS)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
def test_weights_of_any_floating_point_type_become_float32(dtype: torch.dtype, tiny_folder: Path) -> None:
    rewrite(tiny_folder, lambda value: value.to(dtype))
    weights = load_file(tiny_folder / SAFETENSORS)
    state = load_model(weights=tiny_folder).module.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in weights.items())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e300])
def test_weights_that_float32_does_not_hold_are_refused(broken: float, tiny_folder: Path) -> None:
    rewrite(tiny_folder, lambda value: torch.full_like(value, broken, dtype=torch.float64))
    with pytest.raises(GaqError, match="holds NaN or values that are infinite in float32; the checkpoint is damaged"):
        load_model(weights=tiny_folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], "x", {"conv_in.bias": 3}, {"conv_in.bias": None}, {"conv_in.bias": ["a"]}],
)
def test_an_index_of_another_form_is_refused_in_one_line(weight_map: object, tiny_folder: Path) -> None:
    (tiny_folder / SAFETENSORS).unlink()
    (tiny_folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        GaqError, match=r"index of weights .* is not valid: weight_map.* expected .*Copy it again"
    ) as line:
        load_model(weights=tiny_folder)
    assert "\n" not in str(line.value)


@pytest.mark.parametrize("name", ["{outside}", "../outside.safetensors", "link.safetensors"])
def test_an_index_reads_no_file_outside_its_folder(name: str, tiny_folder: Path) -> None:
    outside = tiny_folder.parent / "outside.safetensors"
    os.rename(tiny_folder / SAFETENSORS, outside)
    (tiny_folder / "link.safetensors").symlink_to(outside)
    weight_map = {"conv_in.bias": name.format(outside=outside)}
    (tiny_folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(GaqError, match="leads out of that folder; only files inside it are read"):
        load_model(weights=tiny_folder)


def test_a_folder_without_any_says_which_file_is_needed(tiny_folder: Path) -> None:
    (tiny_folder / SAFETENSORS).unlink()
    with pytest.raises(GaqError, match=f"has no weights beside its config.json; {SAFETENSORS} is needed"):
        load_model(weights=tiny_folder)


def test_a_folder_cannot_have_code_run(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "evil.py").write_text(f"open({str(tiny_folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (tiny_folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with caplog.at_level(logging.WARNING):
        load_model(weights=tiny_folder)
    assert "does not know ['auto_map']; ignored" in caplog.text
    assert not (tiny_folder / "ran").exists()
