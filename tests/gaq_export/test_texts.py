"""Prompts: what a denoiser is told of them is what diffusers' own pipelines tell it, in PyTorch and in engines."""

import json
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import engines
from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.deploy import build, session
from gaq_export.deploy.record import EngineRecord, GraphKind
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import read_metadata
from gaq_export.models import text_encoder
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.provenance import Provenance
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.run import Run
from gaq_export.sharing import pack, triton_repository
from tests.gaq_export.commands import gaq
from tests.gaq_export.sharing.test_triton_repository import draw_by_client, serving

transformers = pytest.importorskip("transformers", reason="no transformers: pip install 'gaq-export[text]'")

LENGTH, END = 12, "<|endoftext|>"
PROMPTS = ["a cat", "the dog, at night", "", "a prompt of many more letters than there is room for"]
SETTINGS = EngineConfig(backend="openvino", threads=1, batch=(2, 2, 4))


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


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[bool], Path]:
    """Return what writes a pipeline folder of one text encoder, or of two as Stable Diffusion XL has them."""
    kept: dict[bool, Path] = {}

    def make(pair: bool) -> Path:
        if pair in kept:
            return kept[pair]
        folder = kept[pair] = tmp_path_factory.mktemp("pipeline")
        words = write_tokenizer(folder / "tokenizer", END)
        make_encoder("CLIPTextModel", words, 16, 1, words - 1 if pair else 2).save_pretrained(folder / "text_encoder")
        if pair:
            write_tokenizer(folder / "tokenizer_2", "!")
            second = make_encoder("CLIPTextModelWithProjection", words, 12, 2, 2)
            second.save_pretrained(folder / "text_encoder_2")
        further = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if pair else {}
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

    return make


def test_one_encoder_gives_its_last_states(write: Callable[[bool], Path]) -> None:
    folder = write(False)
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
def test_two_encoders_give_what_stable_diffusion_xls_pipeline_tells(write: Callable[[bool], Path], zeros: bool) -> None:
    folder = write(True)
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


@pytest.mark.parametrize("pair", [False, True])
def test_engines_of_text_encoders_need_neither_the_folder_nor_pytorchs(
    write: Callable[[bool], Path], pair: bool, tmp_path: Path
) -> None:
    model = load_model(weights=write(pair))
    settings = replace(SETTINGS, backend="onnxruntime") if pair else SETTINGS
    parts, encoders = build.build_texts(model, tmp_path / "unet.plan", settings, check=True)
    assert [part.file.path.name for part in parts] == ["unet-text.plan", "unet-text-2.plan"][: 1 + pair]
    assert all(part.parity is not None and part.parity.sqnr_db[0] > 60 for part in parts)
    provenance = Provenance.of(model, SamplerSpec())
    record = EngineRecord(provenance=provenance, graph=GraphKind.STEP, bits="float", text_encoders=encoders)
    file = replace(parts[0].file, path=tmp_path / "unet.plan", metadata=record.to_json())
    with session.open_texts(file) as found:
        for prompts in (PROMPTS[:1], [*PROMPTS, "one more"]):  # below the least batch, above the largest
            rows, expected = text_encoder.encode(found, prompts), text_encoder.encode(model, prompts)
            assert rows.keys() == expected.keys()
            for name, row in rows.items():
                torch.testing.assert_close(row, expected[name], atol=1e-4, rtol=1e-4)
        conditioning = text_encoder.prompt_conditioning(found, PROMPTS[:2], 3.0)
    assert (conditioning.names, conditioning.guidance) == (("a cat", "the dog, at night"), 3.0)
    for name, row in conditioning.unconditional.items():
        torch.testing.assert_close(row, text_encoder.empty_prompt(model)[name], atol=1e-4, rtol=1e-4)
    (tmp_path / "unet-text.plan.tokens.json").write_text("{}")
    for wrong, message in (
        (file, "tokens.json and .* are of different builds"),
        (replace(file, metadata=replace(record, text_encoders=None).to_json()), "has no text encoders beside it"),
    ):
        with pytest.raises(GaqError, match=message), session.open_texts(wrong):
            pass


@pytest.mark.rtx
@pytest.mark.skipif(engines.find_backend("tensorrt-rtx").can_build() is not None, reason="no TensorRT-RTX: make rtx")
@pytest.mark.parametrize("pair", [False, True])
def test_tensorrt_rtx_builds_text_encoders(write: Callable[[bool], Path], pair: bool, tmp_path: Path) -> None:
    settings = replace(SETTINGS, backend="tensorrt-rtx", threads=None)
    parts, _ = build.build_texts(load_model(weights=write(pair)), tmp_path / "unet.plan", settings, check=False)
    assert [part.file.compute for part in parts] == ["float32"] * (1 + pair)
    assert [spec.shape for part in parts for spec in part.file.outputs][:1] == [(None, LENGTH, 16)]


def test_a_prompt_that_is_too_long_is_cut_and_said(write: Callable[[bool], Path], caplog) -> None:
    rows = text_encoder.encode(write(False), ["a" * 30, "a" * 40])[text_encoder.STATES]
    assert torch.equal(rows[0], rows[1])
    assert "is longer than 12 tokens, and is cut" in caplog.text
    with pytest.raises(GaqError, match="No prompts were given"):
        text_encoder.encode(write(False), [])


def test_text_encoders_are_loaded_strictly(write: Callable[[bool], Path], tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(write(False), folder)
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
        text_encoder.encode(write(False), ["a cat"])


def test_commands_take_prompts(write: Callable[[bool], Path], tmp_path: Path) -> None:
    prompts, other, run, engine = (tmp_path / name for name in ("prompts.txt", "other.txt", "run", "unet.plan"))
    prompts.write_text("a cat\n\nthe dog, at night\n")
    other.write_text("an elk\n")
    words = ("--weights", write(False), "--prompts", prompts, "--guidance", 2, "--recipe", "rtn", "--run", run, "-q")
    for command in (
        ("calibrate", *words),
        ("build-engine", "--run", run, "--backend", "openvino", "--steps", 3, "--out", engine, "-q"),
        ("sample", "--engine", engine, "-n", 2, "--out", tmp_path / "own", "-q"),
        ("sample", "--engine", engine, "-n", 2, "--prompts", other, "--out", tmp_path / "other", "-q"),
    ):
        done = gaq(*command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "own" / "000001-the-dog-at-night.png").is_file()
    drawn = [read_metadata(tmp_path / "other" / f"00000{seed}-an-elk.png")["condition"] for seed in (0, 1)]
    assert drawn == ["an elk", "an elk"]
    pixels = [Image.open(path).tobytes() for path in sorted(tmp_path.glob("o*/000000-*.png"))]
    assert pixels[0] != pixels[1]
    for text, message in ((" \n", "holds no prompts"), (None, "Cannot read the prompts")):
        file = tmp_path / "empty.txt"
        file.unlink(missing_ok=True) if text is None else file.write_text(text)
        failed = gaq("sample", "--engine", engine, "--prompts", file, "--out", tmp_path / "none")
        assert failed.exit_code == 2
        assert message in failed.stderr


@pytest.fixture(scope="module")
def prompted(write: Callable[[bool], Path], tmp_path_factory) -> tuple[LoadedModel, Path]:
    """A model of two text encoders and a decoder that is told prompts, and a folder with its run, engine and images."""
    model, folder = load_model(weights=write(True)), tmp_path_factory.mktemp("prompted")
    model = replace(model, conditioning=text_encoder.prompt_conditioning(model, PROMPTS[:2], 2.0))
    spec = replace(model.spec.sampler, steps=2)
    pipeline.calibrate(model, pipeline.preset("tiny", CalibrationOptions(wbits=8)), folder=folder / "run", sampler=spec)
    config = EngineConfig(backend="onnxruntime", threads=1)
    pipeline.build_engine(folder=folder / "run", out=folder / "unet.plan", config=config, model=model)
    pipeline.sample(folder / "unet.plan", num=3, out=folder / "own")
    return model, folder


def test_a_pack_has_encoders_and_decoder_too(prompted: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    model, folder = prompted
    pack.write_pack(Run(folder=folder / "run"), tmp_path / "pack", model=model)
    engine, words = tmp_path / "unet.plan", ("--backend", "onnxruntime", "--threads", 1, "-q")
    (tmp_path / "elk.txt").write_text("an elk\n")
    for command in (
        ("build-engine", "--weights", tmp_path / "pack", "--run", tmp_path / "run", "--out", engine, *words),
        ("sample", "--engine", engine, "-n", 3, "--out", tmp_path / "drawn", "-q"),
        ("sample", "--engine", engine, "-n", 1, "--prompts", tmp_path / "elk.txt", "--out", tmp_path / "elk", "-q"),
    ):
        done = gaq(*command)
        assert done.exit_code == 0, done.output
    names = [path.name for path in sorted((folder / "own").glob("0*.png"))]
    assert len(names) == 3
    for name in names:
        assert torch.equal(_pixels(folder / "own" / name), _pixels(tmp_path / "drawn" / name))
    assert (tmp_path / "elk" / "000000-an-elk.png").is_file()


def test_a_server_has_encoders_and_a_decoder_beside_the_steps(
    prompted: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    (model, folder), served = prompted, tmp_path / "served"
    triton_repository.write(folder / "run", served, triton_repository.ServingOptions(largest_batch=2), model=model)
    assert {path.name for path in (served / "models").iterdir()} == {"unet", "decoder", "text", "text-2"}
    (tmp_path / "other.txt").write_text("\nan elk\n")
    with serving(served) as (address, models):
        draw_by_client(served, tmp_path / "drawn", "--url", address, "--num", 3)
        assert models["decoder"].batches == [2, 1]
        assert models["unet"].batches == [2, 2, 1, 1]
        assert models["text"].batches == models["text-2"].batches == [2, 1]  # the prompts, and nothing
        other = ("--url", address, "--num", 1, "--prompts", tmp_path / "other.txt", "--guidance", 3)
        draw_by_client(served, tmp_path / "other", *other)
    found = [_pixels(path) for path in sorted((tmp_path / "drawn").iterdir())]
    for own, drawn in zip(sorted((folder / "own").glob("0*.png")), found, strict=True):
        assert (_pixels(own) - drawn).abs().max() <= 1  # batches of another size
    assert (_pixels(tmp_path / "other" / "000000.png") - found[0]).abs().max() > 1


def _pixels(path: Path) -> torch.Tensor:
    return torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int64)
