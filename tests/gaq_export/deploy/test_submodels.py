"""Engines of decoders and text encoders beside the denoiser's: close to PyTorch, and bound to one build."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engines
from engines import EngineConfig, EngineError
from engines.files import record_path
from gaq_export import pipeline
from gaq_export.deploy import build, session, submodels
from gaq_export.deploy.parity import Tolerance
from gaq_export.deploy.record import EngineRecord, GraphKind, LinkedFile, record_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor
from gaq_export.models import text_encoder
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.provenance import Provenance
from gaq_export.sampling import shards, workers
from tests.gaq_export.folders import LENGTH
from tests.records import edit_engine_record

SETTINGS = EngineConfig(backend="openvino", threads=1)
TEXT_SETTINGS = EngineConfig(backend="openvino", threads=1, batch=(2, 2, 4))
SPEC = SamplerSpec(steps=3)
PROMPTS = ["a cat", "the dog, at night", "", "a prompt of many more letters than there is room for"]


def loaded(folder: Path) -> LoadedModel:
    """Return a model with few steps."""
    model = load_model(weights=folder)
    return replace(model, spec=replace(model.spec, sampler=SPEC))


@pytest.fixture(scope="module")
def built(latent_pipelines: dict[str, Path], tmp_path_factory) -> pipeline.Built:
    """The engines of the pipeline with a VAE."""
    folder, model = tmp_path_factory.mktemp("built"), loaded(latent_pipelines["vae"])
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder / "run")
    return pipeline.build_engine(folder=folder / "run", out=folder / "unet.plan", config=SETTINGS)


def test_from_noise_to_pictures_through_two_engines(built: pipeline.Built, tmp_path: Path) -> None:
    assert built.decoder is not None
    assert built.decoder.parity is not None
    assert built.decoder.parity.passed
    assert built.decoder.file.path.name == "unet-decoder.plan"
    assert record_of(built.file).decoder == LinkedFile(file="unet-decoder.plan", sha256=built.decoder.file.sha256)
    assert built.decoder.file.path in workers.files_of(built.file)
    assert session.image_shape(built.file) == (3, 16, 16)
    drawn = pipeline.sample(built.file.path, num=5, out=tmp_path / "pngs", compare=True)
    assert drawn.images.shape == (5, 3, 16, 16)
    assert drawn.images.abs().max() <= 1
    assert drawn.psnr_db is not None
    assert min(drawn.psnr_db) > 15
    record = json.loads((tmp_path / "pngs" / "samples.json").read_text())
    assert record["decoder_sha256"] == built.decoder.file.sha256
    pipeline.sample_shards(built.file.path, num=5, shard=2, out=tmp_path / "shards")
    streamed = torch.cat([images for images, _ in shards.read_shards(tmp_path / "shards")])
    assert torch.equal(streamed, to_uint8_tensor(drawn.images))


def test_latents_are_not_clamped_on_their_way(built: pipeline.Built, latent_pipelines: dict[str, Path]) -> None:
    model, ends = loaded(latent_pipelines["vae"]), list[Tensor]()

    def decode(x: Tensor) -> Tensor:
        ends.append(x)
        return x

    with session.open_engines(built.file) as engine:
        sampling = session.sampling_of(built.file)
        draw = session.draw_with_engine(engine, built.file, replace(sampling, decode=decode))
        assert draw((0, 1), lambda: None).abs().max() == 1
        plain = session.draw_with_engine(engine, built.file, sampling)((0, 1), lambda: None)
    assert torch.equal(plain, ends[0])
    assert ends[0].abs().max() > 1
    exact = loop.run(model.network, (0, 1), model.sampling(SPEC))
    assert exact.abs().max() > 1


def test_the_files_of_one_build_belong_together(built: pipeline.Built, tmp_path: Path) -> None:
    shutil.copytree(built.file.path.parent, tmp_path / "moved")
    plan, other = tmp_path / "moved" / "unet.plan", tmp_path / "moved" / "unet-decoder.plan"
    edit_engine_record(plan, lambda record: record["metadata"]["decoder"].update({"sha256": "0" * 64}))
    with pytest.raises(GaqError, match="are of different builds: run build-engine again"):
        pipeline.sample(plan, num=1, out=tmp_path / "s")

    def without_decoder(record: dict[str, Any]) -> None:
        record["metadata"]["decoder"] = None
        record["metadata"]["provenance"]["model"]["shape"][0] = 4

    edit_engine_record(plan, without_decoder)
    with pytest.raises(GaqError, match=r"draws 4 channels, and pictures have 1 or 3.*if they are latents, .* a vae/"):
        pipeline.sample_shards(plan, num=1, out=tmp_path / "s")
    record_path(plan).write_bytes(record_path(built.file.path).read_bytes())
    other.unlink()
    with pytest.raises(EngineError, match="Cannot read the engine"):
        pipeline.sample(plan, num=1, out=tmp_path / "s")


def test_codes_are_looked_up_in_the_engine(latent_pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=latent_pipelines["vqvae"])
    assert model.decoder is not None
    settings = EngineConfig(backend="onnxruntime", threads=1)
    file = submodels.build_decoder(model.decoder, model.shape, tmp_path / "d.plan", settings)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    latents = 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert submodels.check_decoder(model.decoder, file, latents).passed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submodels, "TOLERANCE", Tolerance(floor_db=300.0, margin_db=-300.0))
        with pytest.raises(GaqError, match=r"engine of the decoder differs from PyTorch: SQNR .* at least 300.0 dB"):
            submodels.check_decoder(model.decoder, file, latents)


@pytest.mark.rtx
@pytest.mark.skipif(engines.find_backend("tensorrt-rtx").can_build() is not None, reason="no TensorRT-RTX: make rtx")
def test_tensorrt_rtx_builds_decoders(latent_pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=latent_pipelines["vqvae"])
    assert model.decoder is not None
    config = EngineConfig(backend="tensorrt-rtx", batch=(1, 2, 4))
    file = submodels.build_decoder(model.decoder, model.shape, tmp_path / "decoder.plan", config)
    assert file.compute == "float32"
    assert file.outputs[0].shape == (None, 3, 16, 16)


@pytest.mark.parametrize("pair", [False, True])
def test_engines_of_text_encoders_need_neither_the_folder_nor_pytorchs(
    text_pipeline: Callable[[bool], Path], pair: bool, tmp_path: Path
) -> None:
    model = load_model(weights=text_pipeline(pair))
    settings = replace(TEXT_SETTINGS, backend="onnxruntime") if pair else TEXT_SETTINGS
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
def test_tensorrt_rtx_builds_text_encoders(text_pipeline: Callable[[bool], Path], pair: bool, tmp_path: Path) -> None:
    settings = replace(TEXT_SETTINGS, backend="tensorrt-rtx", threads=None)
    parts, _ = build.build_texts(load_model(weights=text_pipeline(pair)), tmp_path / "unet.plan", settings, check=False)
    assert [part.file.compute for part in parts] == ["float32"] * (1 + pair)
    assert [spec.shape for part in parts for spec in part.file.outputs][:1] == [(None, LENGTH, 16)]
