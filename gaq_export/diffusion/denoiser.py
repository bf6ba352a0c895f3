"""The narrow waist: everything a sampler knows about a network.

In: a float network, a quantized one, any `nn.Module`. Out: a callable `(x, t) -> predicted noise`, or, for a network
that is told what to draw, `(x, t, cond)`; `conditioning` binds the third, so that samplers need not know. A
wrapped engine has the same shape, so "does quantization hurt?" is one sampler called twice.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Condition = Mapping[str, Tensor]  # what a network is told, by name: (N, ...) each


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
