"""Decoders of latents: as diffusers decodes, loaded as strictly as a denoiser, and engines beside the denoiser's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import engines
from engines import EngineConfig, EngineError
from engines.files import record_path
from gaq_export import pipeline
from gaq_export.deploy import session, submodels
from gaq_export.deploy.build import build_float
from gaq_export.deploy.parity import Tolerance
from gaq_export.deploy.record import LinkedFile, record_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor
from gaq_export.models import diffusers_folder, latent_decoder
from gaq_export.models.loader import LoadedModel, load_model, wrap
from gaq_export.models.provenance import Provenance, find_model
from gaq_export.sampling import shards, workers

SIZE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
}
SETTINGS = EngineConfig(backend="openvino", threads=1)
SPEC = SamplerSpec(steps=3)


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


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """A pipeline folder with each kind of decoder, a tiny U-Net of 8x8 latents, and a scheduler that does not clip."""
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
        made[place] = tmp_path_factory.mktemp(place)
        unet.save_pretrained(made[place] / "unet")
        make().save_pretrained(made[place] / place)
        scheduler = DDIMScheduler(num_train_timesteps=100, beta_end=0.2, clip_sample=False, steps_offset=0)
        scheduler.save_pretrained(made[place] / "scheduler")
    return made


def loaded(folder: Path) -> LoadedModel:
    """Return a model with few steps."""
    model = load_model(weights=folder)
    return replace(model, spec=replace(model.spec, sampler=SPEC))


@pytest.fixture(scope="module")
def built(pipelines: dict[str, Path], tmp_path_factory) -> pipeline.Built:
    """The engines of the pipeline with a VAE."""
    folder, model = tmp_path_factory.mktemp("built"), loaded(pipelines["vae"])
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder / "run")
    return pipeline.build_engine(folder=folder / "run", out=folder / "unet.plan", config=SETTINGS)


@pytest.mark.parametrize("place", KINDS)
def test_a_pipelines_decoder_is_found_and_decodes_as_diffusers_does(place: str, pipelines: dict[str, Path]) -> None:
    decoder = load_model(weights=pipelines[place]).decoder
    assert decoder is not None
    whole, latents = KINDS[place](), 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = whole.decode(latents / whole.config.scaling_factor, return_dict=False)[0]
        torch.testing.assert_close(decoder(latents), expected, atol=1e-5, rtol=1e-5)
    assert not any("encoder" in name.split(".") for name in decoder.state_dict())


def test_latents_have_the_shift_and_the_spread_that_the_config_says() -> None:
    further = {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0], "latents_std": [0.1, 0.2, 0.3]}
    decoder = latent_decoder.LatentDecoder(autoencoder(AutoencoderKL, **further))
    torch.testing.assert_close(decoder.scale.flatten(), torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(decoder.shift.flatten(), torch.tensor([1.0, 2.0, 3.0]))
    shifted = latent_decoder.LatentDecoder(autoencoder(AutoencoderKL, scaling_factor=0.5, shift_factor=0.25))
    assert (shifted.scale.item(), shifted.shift.item()) == (2.0, 0.25)
    plain = latent_decoder.LatentDecoder(autoencoder(AutoencoderKL, scaling_factor=0.5))
    assert diffusers_folder.fingerprint(plain) != diffusers_folder.fingerprint(shifted)


def test_a_decoder_that_is_not_as_it_must_be_is_refused(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipelines["vae"], folder)
    weights, config = folder / "vae" / diffusers_folder.SAFETENSORS, folder / "vae" / "config.json"
    state, fields = load_file(weights), json.loads(config.read_text())
    save_file({name: value for name, value in state.items() if name != "decoder.conv_out.bias"}, weights)
    with pytest.raises(GaqError, match=r"1 tensors missing \[decoder.conv_out.bias\]"):
        load_model(weights=folder)
    save_file(state, weights)
    config.write_text(json.dumps(fields | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(GaqError, match=r"describes a 'AutoencoderDC'; decoders of \['AutoencoderKL', 'VQModel'\]"):
        load_model(weights=folder)
    config.write_text(json.dumps(fields | {"layers_per_block": "many"}))
    with pytest.raises(GaqError, match="diffusers cannot build the decoder in"):
        load_model(weights=folder)
    config.write_text("[]")
    with pytest.raises(GaqError, match=r"decoder's config .* must hold a JSON object, not a list"):
        load_model(weights=folder)
    config.write_text(json.dumps(fields))
    with pytest.raises(GaqError, match="takes latents of 3 channels, but the denoiser beside it makes 4"):
        latent_decoder.find_decoder(folder, 4)
    shutil.copytree(folder / "vae", folder / "vqvae")
    with pytest.raises(GaqError, match="holds both a vae/ and a vqvae/"):
        load_model(weights=folder)


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


def test_latents_are_not_clamped_on_their_way(built: pipeline.Built, pipelines: dict[str, Path]) -> None:
    model, ends = loaded(pipelines["vae"]), list[Tensor]()

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
    record = record_path(plan)
    fields = json.loads(record.read_text())
    fields["metadata"]["decoder"]["sha256"] = "0" * 64
    record.write_text(json.dumps(fields))
    with pytest.raises(GaqError, match="are of different builds: run build-engine again"):
        pipeline.sample(plan, num=1, out=tmp_path / "s")
    fields["metadata"]["decoder"] = None
    fields["metadata"]["provenance"]["model"]["shape"][0] = 4
    record.write_text(json.dumps(fields))
    for draw in (pipeline.sample, pipeline.sample_shards):
        with pytest.raises(GaqError, match="draws latents of 4 channels and has no decoder of them beside it"):
            draw(plan, num=1, out=tmp_path / "s")
    record.write_bytes(record_path(built.file.path).read_bytes())
    other.unlink()
    with pytest.raises(EngineError, match="Cannot read the engine"):
        pipeline.sample(plan, num=1, out=tmp_path / "s")


def test_codes_are_looked_up_in_the_engine(pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=pipelines["vqvae"])
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


def test_the_same_decoder_is_found_again_or_missed(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipelines["vae"], folder)
    recorded = Provenance.of(load_model(weights=folder), SPEC)
    assert find_model(recorded, None, tmp_path).decoder is not None
    autoencoder(AutoencoderKL, scaling_factor=0.6).save_pretrained(folder / "vae")
    with pytest.raises(GaqError, match=r"calibrated with a decoder of latents, weights .*; found another"):
        find_model(recorded, None, tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(GaqError, match="found none with this model"):
        find_model(recorded, None, tmp_path)


def test_a_module_of_ones_own_has_a_decoder_of_ones_own(pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=pipelines["vae"])
    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 1))
    own = wrap(model.network, shape=model.shape, schedule=model.schedule, sampler=SPEC, decoder=decoder)
    file = build_float(own, tmp_path / "own.plan", config=SETTINGS)
    drawn = pipeline.sample(file.path, num=2, out=tmp_path / "s", compare=True, model=own)
    assert drawn.images.shape == (2, 1, 16, 16)
    assert drawn.psnr_db is not None
    assert min(drawn.psnr_db) > 60
    assert (tmp_path / "own-decoder.plan.json").is_file()


@pytest.mark.rtx
@pytest.mark.skipif(engines.find_backend("tensorrt-rtx").can_build() is not None, reason="no TensorRT-RTX: make rtx")
def test_tensorrt_rtx_builds_decoders(pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=pipelines["vqvae"])
    assert model.decoder is not None
    config = EngineConfig(backend="tensorrt-rtx", batch=(1, 2, 4))
    file = submodels.build_decoder(model.decoder, model.shape, tmp_path / "decoder.plan", config)
    assert file.compute == "float32"
    assert file.outputs[0].shape == (None, 3, 16, 16)
