"""What tests of all rooms share: a U-Net small enough to run in milliseconds, its folder, and a foreign network."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import constants
from hypothesis import settings
from torch import Tensor, nn

from gaq_export.diffusion.schedule import NoiseSchedule, linear_schedule

settings.register_profile("any machine", deadline=None)  # no test is about time
settings.load_profile("any machine")

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Layers this small gain nothing from a second thread, and on a busy machine wait for it a hundred times over."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tiny_unet() -> Callable[[], UNet2DModel]:
    """Return what makes the seeded `UNet2DModel` on 16x16 one-channel images, one attention block on each side."""

    def make() -> UNet2DModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UNet2DModel(**TINY).eval()

    return make


@pytest.fixture
def tiny_unet(make_tiny_unet: Callable[[], UNet2DModel]) -> UNet2DModel:
    """The tiny U-Net."""
    return make_tiny_unet()


@pytest.fixture
def tiny_schedule() -> NoiseSchedule:
    """A linear schedule of 100 timesteps, clipping the clean image to [-1, 1]."""
    return linear_schedule(num_train=100, beta_end=0.2)


@pytest.fixture(scope="session")
def write_tiny_folder() -> Callable[[UNet2DModel, Path], Path]:
    """Return what writes a U-Net as a diffusers folder, with the scheduler config of `tiny_schedule`."""

    def write(unet: UNet2DModel, folder: Path) -> Path:
        unet.save_pretrained(folder)
        scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.2}
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler | {"clip_sample": True}))
        return folder

    return write


@pytest.fixture
def tiny_folder(tiny_unet: UNet2DModel, write_tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny U-Net as a diffusers folder named `tiny`."""
    return write_tiny_folder(tiny_unet, tmp_path / "tiny")


class Foreign(nn.Module):
    """Everything a diffusers U-Net does not have, on 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8))
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 4, stride=2, padding=1)
        self.gate = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False))
        self.shared = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.relu(self.down(self.enter(x)))
        h = h + self.time(t[:, None] / 100)[:, :, None, None]
        h = h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        n, c, height, width = h.shape
        tokens = self.norm(h.flatten(2).transpose(1, 2))  # (N, C, H, W) -> (N, H*W, C)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.mlp(tokens)
        tokens = self.shared(torch.relu(self.shared(tokens)))
        out: Tensor = self.leave(self.up(tokens.transpose(1, 2).reshape(n, c, height, width)))
        return out


@pytest.fixture(scope="session")
def make_foreign() -> Callable[[], nn.Module]:
    """Return what makes the seeded foreign network, called as (x (N, 1, 8, 8), t (N,))."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Foreign().eval()

    return make
