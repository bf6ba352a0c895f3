"""What tests of all rooms share: a U-Net small enough to run in milliseconds, and its folder on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import constants

from gaq_export.schedule import NoiseSchedule, linear_schedule

TINY = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what to call with an address to make the Hugging Face client ask there."""

    def move(endpoint: str) -> None:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)

    return move


@pytest.fixture(autouse=True)
def _a_world_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub_at: Callable[[str], None]) -> None:
    """Hide the developer's models, cache and network, so that no test passes or fails because of them."""
    monkeypatch.delenv("GAQ_EXPORT_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    hub_at("http://127.0.0.1:9")


@pytest.fixture
def tiny_unet() -> UNet2DModel:
    """A seeded `UNet2DModel` on 16x16 one-channel images, with one attention block on each side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**TINY).eval()


@pytest.fixture
def tiny_schedule() -> NoiseSchedule:
    """A linear schedule of 100 timesteps, clipping the clean image to [-1, 1]."""
    return linear_schedule(num_train=100, beta_end=0.2)


@pytest.fixture
def tiny_folder(tiny_unet: UNet2DModel, tmp_path: Path) -> Path:
    """The tiny U-Net as a diffusers folder named `tiny`, with the scheduler config of `tiny_schedule`."""
    folder = tmp_path / "tiny"
    tiny_unet.save_pretrained(folder)
    scheduler = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.2, "clip_sample": True}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
