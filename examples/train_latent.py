"""Train a small latent diffusion model: an autoencoder of 32x32 images, then a denoiser of its 8x8 latents.

    python examples/train_latent.py --images mnist.npz --out digits
    gaq-export calibrate --weights digits
    gaq-export build-engine
    gaq-export sample --engine unet.plan --compare

In: images as for `train_ddpm.py`. Out: a diffusers pipeline folder (an `LDMPipeline`), `decoded.png` with images above
their reconstructions, and `samples.png`. `build-engine` then writes two engines, and `sample` runs both.

The autoencoder is the one of Rombach et al. 2022 (arXiv 2112.10752) at a fiftieth of its size, trained with the mean
square error and a slight pull of its latents to a normal distribution, without their perceptual and adversarial losses.
Its latents are divided by their standard deviation, and the denoiser learns as in `train_ddpm.py`.
"""

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn
from train_ddpm import load_images

from gaq_export.diffusion import loop
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import psnr, save_grid
from gaq_export.models.architectures import as_denoiser
from gaq_export.models.latent_decoder import LatentDecoder, load_decoder
from gaq_export.models.scheduler_config import schedule_from_scheduler_config

SIZE, CHANNELS = 32, 4  # of an image's side; of latents
PULL = 2e-4  # of the latents to a normal distribution
WARM_UP, FLOOR, EMA_DECAY, CLIP_NORM = 100, 0.03, 0.998, 1.0
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
}


def main(
    images: Annotated[Path, typer.Option(help=".npz or .npy of uint8 images, or a folder of PNG and JPEG files.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    channels: Annotated[int, typer.Option(help="Of the images: 1 or 3.")] = 1,
    vae_steps: Annotated[int, typer.Option(min=1, help="Steps of the autoencoder.")] = 500,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the denoiser.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
) -> None:
    """Train a latent diffusion model that gaq-export can quantize."""
    try:
        data = load_images(images, channels, SIZE)
    except GaqError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    torch.manual_seed(seed)
    vae = train_autoencoder(data, channels, vae_steps, batch)
    moments = encode(vae, data)
    vae.register_to_config(scaling_factor=1 / float(sampled(moments).std()))
    vae.save_pretrained(out / "vqvae")
    save_grid(out / "decoded.png", list(decoded(vae, data[:16])))
    unet = train_denoiser(moments, float(vae.config["scaling_factor"]), steps, batch)
    unet.save_pretrained(out / "unet")
    write_pipeline(out)
    draw(out, unet)


def train_autoencoder(data: Tensor, channels: int, steps: int, batch: int) -> AutoencoderKL:
    """Return an autoencoder of `data`, (N, C, 32, 32) uint8, whose latents are (N, 4, 8, 8)."""
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=SIZE,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for step in range(steps):
        x = _batch(data, batch)
        posterior = vae.encode(x).latent_dist
        error = nn.functional.mse_loss(vae.decode(posterior.sample(), return_dict=False)[0], x)
        pull = posterior.kl().mean() / posterior.mean[0].numel()
        _step(vae, optimizer, error + PULL * pull, 3e-3, step, steps)
        if (step + 1) % 100 == 0:
            typer.echo(f"autoencoder, step {step + 1}  error {error.item():.4f}  pull {pull.item():.2f}")
    return vae.eval()


def train_denoiser(moments: tuple[Tensor, Tensor], scale: float, steps: int, batch: int) -> UNet2DModel:
    """Return a denoiser of latents; its weights are a moving average over the training steps.

    Args:
        moments: Mean and standard deviation of every image's latents, see `encode`.
        scale: Factor of the latents, so that their standard deviation is 1.
        steps: Number of training steps.
        batch: Images per step.
    """
    unet = UNet2DModel(
        sample_size=SIZE // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    schedule = schedule_from_scheduler_config(SCHEDULER)
    optimizer, running = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-4), math.nan
    for step in range(steps):
        rows = torch.randint(len(moments[0]), (batch,))
        clean = scale * sampled((moments[0][rows], moments[1][rows]))
        noise, t = torch.randn_like(clean), torch.randint(schedule.num_train, (batch,))
        a = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted, noise)
        _step(unet, optimizer, loss, 2e-3, step, steps)
        for name, value in unet.state_dict().items():
            ema[name].lerp_(value.detach(), 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        running = loss.item() if math.isnan(running) else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % 200 == 0:
            typer.echo(f"denoiser, step {step + 1}  loss {running:.4f}")
    unet.load_state_dict(ema)
    return unet.eval()


def _batch(data: Tensor, batch: int) -> Tensor:
    return data[torch.randint(len(data), (batch,))].float() / 127.5 - 1


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, step: int, steps: int) -> None:
    """Take one step of AdamW at a rate that warms up and falls along a cosine."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * min((step + 1) / WARM_UP, cosine)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    optimizer.step()


def encode(vae: AutoencoderKL, data: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of all images, (N, 4, 8, 8) both."""
    means, deviations = [], []
    with torch.no_grad():
        for part in torch.split(data, 256):
            posterior = vae.encode(part.float() / 127.5 - 1).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)


def sampled(moments: tuple[Tensor, Tensor]) -> Tensor:
    """Return latents drawn from their distributions."""
    mean, deviation = moments
    return mean + deviation * torch.randn_like(mean)


def decoded(vae: AutoencoderKL, data: Tensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """Return images and their reconstructions, and print the PSNR between them."""
    x = data.float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(x).latent_dist.mean, return_dict=False)[0].clamp(-1, 1)
    typer.echo(f"autoencoder: median PSNR {psnr(x, again).median():.1f} dB")
    return ("images", x), ("decoded", again)


def write_pipeline(out: Path) -> None:
    """Write the scheduler's config and the index of an `LDMPipeline`, in which the autoencoder is called `vqvae`."""
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    parts = {"vqvae": "AutoencoderKL", "unet": "UNet2DModel", "scheduler": "DDIMScheduler"}
    index = {"_class_name": "LDMPipeline"} | {place: ["diffusers", kind] for place, kind in parts.items()}
    for path, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", index)):
        (out / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(out: Path, unet: UNet2DModel) -> None:
    """Draw 32 images with the float networks."""
    decoder: LatentDecoder = load_decoder(out / "vqvae")
    schedule, shape = schedule_from_scheduler_config(SCHEDULER), (CHANNELS, SIZE // 4, SIZE // 4)
    decode = torch.no_grad()(decoder)
    sampling = Sampling(schedule=schedule, shape=shape, sampler=SamplerSpec(steps=50), decode=decode)
    drawn = loop.run(as_denoiser(unet), range(32), sampling)
    save_grid(out / "samples.png", [("", drawn[:16]), ("", drawn[16:])])
    typer.echo(f"Model, decoded.png and samples.png are in {out}")


if __name__ == "__main__":
    typer.run(main)
