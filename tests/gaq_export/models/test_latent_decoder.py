"""Decoders of latents: as diffusers decodes, loaded as strictly as a denoiser, and engines beside the denoiser's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.deploy.build import build_float
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models import diffusers_folder, latent_decoder
from gaq_export.models.loader import load_model, wrap
from gaq_export.models.provenance import Provenance, find_model
from gaq_export.models.weight_files import SAFETENSORS
from tests.gaq_export.folders import KINDS, autoencoder

SETTINGS = EngineConfig(backend="openvino", threads=1)
SPEC = SamplerSpec(steps=3)


@pytest.mark.parametrize("place", KINDS)
def test_a_pipelines_decoder_is_found_and_decodes_as_diffusers_does(
    place: str, latent_pipelines: dict[str, Path]
) -> None:
    decoder = load_model(weights=latent_pipelines[place]).decoder
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


def test_a_decoder_that_is_not_as_it_must_be_is_refused(latent_pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(latent_pipelines["vae"], folder)
    weights, config = folder / "vae" / SAFETENSORS, folder / "vae" / "config.json"
    state, fields = load_file(weights), json.loads(config.read_text())
    save_file({name: value for name, value in state.items() if name != "decoder.conv_out.bias"}, weights)
    with pytest.raises(GaqError, match=r"1 tensors missing \[decoder.conv_out.bias\]"):
        load_model(weights=folder)
    save_file(state, weights)
    config.write_text(json.dumps(fields | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(GaqError, match=r"describes a 'AutoencoderDC'; decoders of \['AutoencoderKL', 'VQModel'\]"):
        load_model(weights=folder)
    config.write_text(json.dumps(fields | {"norm_num_groups": 7}))
    with pytest.raises(GaqError, match="diffusers cannot build the decoder in"):
        load_model(weights=folder)
    for wrong in ("x", [], [1.0, 2.0], {"a": 1}):
        config.write_text(json.dumps(fields | {"latents_mean": wrong}))
        with pytest.raises(GaqError, match=r"has latents_mean .*, not a number for each channel"):
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


def test_the_same_decoder_is_found_again_or_missed(latent_pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(latent_pipelines["vae"], folder)
    recorded = Provenance.of(load_model(weights=folder), SPEC)
    assert find_model(recorded, None, tmp_path).decoder is not None
    autoencoder(AutoencoderKL, scaling_factor=0.6).save_pretrained(folder / "vae")
    with pytest.raises(GaqError, match=r"calibrated with a decoder of latents, weights .*; found another"):
        find_model(recorded, None, tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(GaqError, match="found none with this model"):
        find_model(recorded, None, tmp_path)


def test_a_module_of_ones_own_has_a_decoder_of_ones_own(latent_pipelines: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(weights=latent_pipelines["vae"])
    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 1))
    own = wrap(model.network, shape=model.shape, schedule=model.schedule, sampler=SPEC, decoder=decoder)
    file = build_float(own, tmp_path / "own.plan", config=SETTINGS)
    drawn = pipeline.sample(file.path, num=2, out=tmp_path / "s", compare=True, model=own)
    assert drawn.images.shape == (2, 1, 16, 16)
    assert drawn.psnr_db is not None
    assert min(drawn.psnr_db) > 60
    assert (tmp_path / "own-decoder.plan.json").is_file()
