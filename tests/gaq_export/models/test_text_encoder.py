"""Prompts become the conditions that diffusers' own pipelines compute, and folders are loaded strictly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from engines import EngineConfig
from gaq_export.errors import GaqError
from gaq_export.models import text_encoder
from gaq_export.models.loader import load_model
from tests.gaq_export.folders import LENGTH

transformers = pytest.importorskip("transformers", reason="no transformers: pip install 'gaq-export[text]'")

PROMPTS = ["a cat", "the dog, at night", "", "a prompt of many more letters than there is room for"]
SETTINGS = EngineConfig(backend="openvino", threads=1, batch=(2, 2, 4))


def test_one_encoder_gives_its_last_states(text_pipeline: Callable[[bool], Path]) -> None:
    folder = text_pipeline(False)
    rows = text_encoder.encode(folder, PROMPTS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")(ids)[0]
    assert list(rows) == ["encoder_hidden_states"]
    torch.testing.assert_close(rows["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-5)
    empty = text_encoder.empty_prompt(load_model(weights=folder))
    torch.testing.assert_close(empty["encoder_hidden_states"], expected[2:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_two_encoders_give_what_stable_diffusion_xls_pipeline_computes(
    text_pipeline: Callable[[bool], Path], zeros: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(text_pipeline(True), tmp_path / "pipeline")
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": zeros}))
    theirs = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        force_zeros_for_empty_prompt=zeros,
    )
    with torch.no_grad():
        states, without, pooled, pooled_without = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    rows, empty = text_encoder.encode(folder, PROMPTS), text_encoder.empty_prompt(folder)
    torch.testing.assert_close(rows["encoder_hidden_states"], states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows["text_embeds"], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(empty["encoder_hidden_states"], without[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(empty["text_embeds"], pooled_without[:1], atol=1e-5, rtol=1e-5)
    assert rows["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
    assert empty["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert bool(empty["text_embeds"].any()) is not zeros
    assert {name: row.shape[1:] for name, row in rows.items()} == {
        name: row.shape[1:]
        for name, row in load_model(weights=folder).condition_inputs.items()
        if name != text_encoder.STATES
    } | {text_encoder.STATES: (LENGTH, 28)}


def test_a_prompt_that_is_too_long_is_cut_and_said(text_pipeline: Callable[[bool], Path], caplog) -> None:
    rows = text_encoder.encode(text_pipeline(False), ["a" * 30, "a" * 40])[text_encoder.STATES]
    assert torch.equal(rows[0], rows[1])
    assert "is longer than 12 tokens, and is cut" in caplog.text
    with pytest.raises(GaqError, match="No prompts were given"):
        text_encoder.encode(text_pipeline(False), [])


def test_text_encoders_are_loaded_strictly(text_pipeline: Callable[[bool], Path], tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(text_pipeline(False), folder)
    weights, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    state, fields = load_file(weights), json.loads(config.read_text())
    expected = text_encoder.encode(folder, ["a cat"])[text_encoder.STATES]
    old = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}, weights)  # as the hub has them
    assert torch.equal(text_encoder.encode(folder, ["a cat"])[text_encoder.STATES], expected)
    name = next(name for name in state if name.endswith("final_layer_norm.bias"))
    save_file({n: value for n, value in state.items() if n != name}, weights)
    with pytest.raises(GaqError, match=r"1 tensors missing \[.*final_layer_norm.bias\]"):
        text_encoder.encode(folder, ["a cat"])
    save_file(state, weights)
    config.write_text(json.dumps(fields | {"architectures": ["T5EncoderModel"]}))
    with pytest.raises(GaqError, match="is a 'T5EncoderModel'; supported are"):
        text_encoder.encode(folder, ["a cat"])
    config.write_text(json.dumps(fields | {"hidden_size": 7}))
    with pytest.raises(GaqError, match="transformers cannot build the text encoder in"):
        text_encoder.encode(folder, ["a cat"])
    config.write_text(json.dumps(fields))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(GaqError, match="No tokenizer can be read from"):
        text_encoder.encode(folder, ["a cat"])
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(GaqError, match="has no text_encoder/ beside its network"):
        text_encoder.encode(folder, ["a cat"])
    monkeypatch.setattr(text_encoder, "installed", lambda: False)
    with pytest.raises(GaqError, match=r"pip install 'gaq-export\[text\]'"):
        text_encoder.encode(text_pipeline(False), ["a cat"])


DAMAGE = {
    "tokenizer/vocab.json": ("{}", "[]", '{"a": 1}', '{"a": -5}', "{"),
    "tokenizer/merges.txt": ("#version: 0.2\na b c\n", "a\n"),
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in DAMAGE.items() for text in texts])
def test_a_damaged_tokenizer_is_refused_in_one_line(
    file: str, text: str, text_pipeline: Callable[[bool], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(text_pipeline(False), tmp_path / "pipeline")
    (folder / file).write_text(text)
    with pytest.raises(GaqError, match=r"No tokenizer can be read from .*tokenizer \(") as caught:
        text_encoder.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"eos_token_id": []}, {"vocab_size": -3}, {"num_hidden_layers": 10**6}])
def test_a_text_encoder_of_wrong_sizes_is_refused(
    fields: dict[str, object], text_pipeline: Callable[[bool], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(text_pipeline(False), tmp_path / "pipeline")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(
        GaqError, match=rf"The text encoder's config .* is not valid: {next(iter(fields))} is .* expected"
    ):
        text_encoder.load(folder)


def test_a_network_of_five_time_ids_is_a_refiners(text_pipeline: Callable[[bool], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(text_pipeline(True), tmp_path / "pipeline")
    config = folder / "unet" / "config.json"
    # Five ids of 4 numbers and nothing else would fit, six do not.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"projection_class_embeddings_input_dim": 20}))
    with pytest.raises(GaqError, match=r"has no room for 6 time ids beside a text, .*; a refiner takes five"):
        load_model(weights=folder)
