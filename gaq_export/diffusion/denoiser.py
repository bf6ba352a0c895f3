"""The narrow waist: everything a sampler knows about a network.

A float network, a quantized one and an open engine all become a callable `(x, t) -> predicted noise`, so "does
quantization hurt?" is one sampler called twice. Where a network takes a condition, `conditioning.bind` adds it.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from engines import Engine

Condition = Mapping[str, Tensor]  # tensors by the name of the network's input, (N, ...) each


class Denoiser(Protocol):
    """Predict the noise in a batch of noisy images."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        """Predict noise.

        Args:
            x: Noisy images, (N, C, H, W) float32.
            t: Training timestep of each image, (N,) int64.

        Returns:
            Predicted noise, the shape and dtype of `x`.
        """
        ...


def engine_denoiser(engine: Engine) -> Callable[..., Tensor]:
    """Make an open engine callable as `(x, t)`, or `(x, t, cond)`.

    Args:
        engine: takes `x`, `t` and the condition by name, returns `eps`; the caller closes it.
    """

    def denoise(x: Tensor, t: Tensor, cond: Condition | None = None, /) -> Tensor:
        condition = {name: tensor.cpu().numpy() for name, tensor in (cond or {}).items()}
        return torch.from_numpy(engine({"x": x.cpu().numpy(), "t": t.cpu().numpy(), **condition})["eps"]).to(x.device)

    return denoise
