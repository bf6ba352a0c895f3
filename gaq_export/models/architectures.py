"""The architectures of diffusers that can be loaded: how each is called, and which conditioning it takes.

A network of `ARCHITECTURES` becomes an `EpsilonModel`, called as `(x, t)` or `(x, t, cond)`, like any other module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from gaq_export.diffusion.denoiser import Condition

ADDED = ("text_embeds", "time_ids")  # what Stable Diffusion XL takes beside the text's states
TOKENS = 77  # length of CLIP's texts
TIME_IDS = 6  # of Stable Diffusion XL: original size, crop and target size, two numbers each


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


class ClassUNet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no annotations
    """A `UNet2DConditionModel` whose texts are single rows of a table, one for each class.

    That is how latent diffusion draws the classes of ImageNet (Rombach et al. 2022); the last class stands for none.

    Args:
        classes: Rows of the table, the unconditional one included.
        unet: The fields of `UNet2DConditionModel`.
    """

    def __init__(self, *, classes: int, **unet: Any) -> None:
        super().__init__(**unet)
        self.register_to_config(classes=classes)
        self.class_table = nn.Embedding(classes, self.config["cross_attention_dim"])


def _class_unet(network: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    row = network.get_submodule("class_table")(cond["class_labels"])[:, None]  # (N,) -> (N, 1, D)
    return _conditional_unet(network, x, t, {"encoder_hidden_states": row})


def _dit(network: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    epsilon: Tensor = network(x, timestep=t, class_labels=cond["class_labels"], return_dict=False)[0]
    return epsilon


def _label_inputs(count: int | None) -> dict[str, Tensor]:
    return {} if count is None else {"class_labels": torch.zeros(1, dtype=torch.int64)}


def _text_inputs(config: Mapping[str, Any]) -> dict[str, Tensor]:
    rows = {"encoder_hidden_states": torch.zeros(1, TOKENS, config["cross_attention_dim"])}
    if config["addition_embed_type"] == "text_time":
        # The projection takes the pooled text beside an embedding of each time id; only their sum is in the config.
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        rows |= {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, TIME_IDS)}
    return _label_inputs(config["num_class_embeds"]) | rows


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How networks of one class of diffusers are called.

    Attributes:
        call: Calls one, as (network, x, t, condition); returns the predicted noise and perhaps a learned variance.
        condition_inputs: From its config to an example of its condition, one row (1, ...) of each tensor.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    condition_inputs: Callable[[Mapping[str, Any]], dict[str, Tensor]]


ARCHITECTURES: Mapping[type[nn.Module], Architecture] = {
    UNet2DModel: Architecture(call=_unet, condition_inputs=lambda config: _label_inputs(config["num_class_embeds"])),
    UNet2DConditionModel: Architecture(call=_conditional_unet, condition_inputs=_text_inputs),
    ClassUNet: Architecture(call=_class_unet, condition_inputs=lambda config: _label_inputs(config["classes"])),
    DiTTransformer2DModel: Architecture(
        call=_dit, condition_inputs=lambda config: _label_inputs(config["num_embeds_ada_norm"])
    ),
}


class EpsilonModel(nn.Module):
    """Call a network of `ARCHITECTURES` as `(x, t)`, or `(x, t, cond)`, and return the bare tensor.

    A module and not a closure, because the ONNX exporter takes a module; its one child is named `unet`, so every
    layer's name in plans and graphs is `unet.` plus its name here, also where the child is a transformer. `cond` has
    diffusers' names: class_labels, encoder_hidden_states, text_embeds, time_ids.
    """

    # The exporter writes this path into every graph; pinned, so that moving the class changes no exported byte.
    __module__ = "gaq_export.denoiser"

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        out = ARCHITECTURES[type(self.unet)].call(self.unet, x, t, cond or {})
        channels = x.shape[1]
        # (N, 2C, H, W) -> (N, C, H, W): the second half is a learned variance, which no sampler here uses.
        return out if out.shape[1] == channels else out[:, :channels]


def as_denoiser(module: nn.Module) -> nn.Module:
    """Make a network callable as `(x, t)`, or `(x, t, cond)`.

    Args:
        module: One of `ARCHITECTURES`, or any module already called that way, which is returned as it is.
    """
    return EpsilonModel(module).train(module.training) if type(module) in ARCHITECTURES else module


def condition_inputs_of(module: nn.Module) -> dict[str, Tensor]:
    """Return an example of a network's condition, one row (1, ...) of each tensor; empty if it is in no table here."""
    architecture = ARCHITECTURES.get(type(module))
    config = config_of(module)
    return architecture.condition_inputs(config) if architecture and config else {}


def class_rows(module: nn.Module) -> int | None:
    """Return the number of classes in a network's table, the unconditional one included; None if it has no classes."""
    config = config_of(module)
    if "num_embeds_ada_norm" in config:  # of diffusion transformers, which count the unconditional row apart
        return int(config["num_embeds_ada_norm"]) + 1
    count = config.get("classes", config.get("num_class_embeds"))
    return None if count is None else int(count)


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """Return the architecture of a network as its `config.json` says it; empty for a module that is not diffusers'."""
    config: Mapping[str, Any] = getattr(module, "config", {})
    return config
