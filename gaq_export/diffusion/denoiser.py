"""The narrow waist: everything a sampler knows about a network.

A float network, a quantized one and an open engine all become a callable `(x, t) -> predicted noise`, so "does
quantization hurt?" is one sampler called twice. Where a network takes a condition, `conditioning.bind` adds it.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

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
