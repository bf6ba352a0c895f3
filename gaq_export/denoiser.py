"""The narrow waist: everything a sampler knows about a network.

In: a float network, a quantized one, any `nn.Module`. Out: a callable `(x, t) -> predicted noise`, or, for a network
that is told what to draw, `(x, t, cond)`; `told` binds the third, so that samplers need not know. A wrapped engine has
the same shape, so "does quantization hurt?" is one sampler called twice.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from engines import Engine

Condition = Mapping[str, Tensor]  # what a network is told, by name: (N, ...) each
ADDED = ("text_embeds", "time_ids")  # what Stable Diffusion XL is told beside the text's states


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


def _unet(network: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    epsilon: Tensor = network(x, t, class_labels=cond.get("class_labels"), return_dict=False)[0]
    return epsilon


def _conditional_unet(network: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    added = {name: cond[name] for name in ADDED if name in cond}
    epsilon: Tensor = network(
        x,
        t,
        encoder_hidden_states=cond["encoder_hidden_states"],
        class_labels=cond.get("class_labels"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return epsilon


def _dit(network: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    out: Tensor = network(x, timestep=t, class_labels=cond["class_labels"], return_dict=False)[0]
    return out[:, : x.shape[1]]  # the other half, if there is one, is a learned variance


# How networks of diffusers are called.
CALLS: Mapping[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]] = {
    UNet2DModel: _unet,
    UNet2DConditionModel: _conditional_unet,
    DiTTransformer2DModel: _dit,
}


class EpsilonModel(nn.Module):
    """Call a network of `CALLS` as `(x, t)`, or `(x, t, cond)`, and return the bare tensor.

    A module and not a closure, because the ONNX exporter takes a module; its one child is named `unet`, so every
    layer's name in the exported graph is `unet.` plus its name here. `cond` has diffusers' names: class_labels,
    encoder_hidden_states, text_embeds, time_ids.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        return CALLS[type(self.unet)](self.unet, x, t, cond or {})


def as_denoiser(unet: nn.Module) -> nn.Module:
    """Make a network callable as `(x, t)`, or `(x, t, cond)`.

    Args:
        unet: One of `CALLS`, or any module already called that way, which is returned as it is.
    """
    return EpsilonModel(unet) if type(unet) in CALLS else unet


def told(network: Callable[[Tensor, Tensor, Condition], Tensor], cond: Condition) -> Denoiser:
    """Return the network as one that is told `cond` (N, ...) at every call, of N images."""
    return lambda x, t, /: network(x, t, cond)


def guided(
    network: Callable[[Tensor, Tensor, Condition], Tensor], cond: Condition, instead: Condition, scale: float
) -> Denoiser:
    """Return the network with classifier-free guidance (Ho and Salimans 2022): away from what it says of `instead`.

    epsilon = epsilon(instead) + scale * (epsilon(cond) - epsilon(instead)), both in one call of twice the batch.

    Args:
        network: called as (x, t, cond).
        cond: what to draw, (N, ...) each.
        instead: nothing, an empty text or the class that stands for none; (N, ...) each.
        scale: 1 is no guidance.
    """
    both = {name: torch.cat((instead[name], cond[name])) for name in cond}

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        without, with_it = network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        return without + scale * (with_it - without)

    return denoise


def engine_denoiser(engine: Engine) -> Denoiser:
    """Make an open engine callable as a denoiser.

    Args:
        engine: takes `x` and `t`, gives `eps`; the caller keeps it open and closes it.
    """

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        return torch.from_numpy(engine({"x": x.numpy(), "t": t.numpy()})["eps"])

    return denoise
