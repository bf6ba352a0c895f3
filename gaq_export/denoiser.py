"""The narrow waist: everything a sampler knows about a network.

In: a float U-Net, a quantized one, any `nn.Module`. Out: a callable `(x, t) -> predicted noise`. A wrapped engine
has the same shape, so "does quantization hurt?" is one sampler called twice.
"""

from typing import Protocol

import torch
from diffusers import UNet2DModel
from torch import nn

from engines import Engine


class Denoiser(Protocol):
    """Predict the noise in a batch of noisy images."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, /) -> torch.Tensor:
        """Predict noise.

        Args:
            x: Noisy images, (N, C, H, W) float32.
            t: Training timestep of each image, (N,) int64.

        Returns:
            Predicted noise, the shape and dtype of `x`.
        """
        ...


class EpsilonModel(nn.Module):
    """Call a diffusers `UNet2DModel` as `(x, t)` and return the bare tensor.

    A module and not a closure, because the ONNX exporter takes a module; its one child is named `unet`, so every
    layer's name in the exported graph is `unet.` plus its name here.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        epsilon: torch.Tensor = self.unet(x, t, return_dict=False)[0]
        return epsilon


def as_denoiser(unet: nn.Module) -> Denoiser:
    """Make a network callable as `(x, t)`.

    Args:
        unet: A diffusers `UNet2DModel`, or any module already called that way, which is returned as it is.
    """
    return EpsilonModel(unet) if isinstance(unet, UNet2DModel) else unet


def engine_denoiser(engine: Engine) -> Denoiser:
    """Make an open engine callable as a denoiser.

    Args:
        engine: takes `x` and `t`, gives `eps`; the caller keeps it open and closes it.
    """

    def denoise(x: torch.Tensor, t: torch.Tensor, /) -> torch.Tensor:
        return torch.from_numpy(engine({"x": x.numpy(), "t": t.numpy()})["eps"])

    return denoise
