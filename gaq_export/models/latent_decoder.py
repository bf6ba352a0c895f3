"""The decoder that turns the latents of a latent diffusion model into images.

In: a diffusers pipeline folder with a `vae/` (AutoencoderKL) or a `vqvae/` (VQModel). Out: a module from the sampler's
latents, (N, C, h, w), to images, (N, 3, H, W), roughly in [-1, 1]. It undoes the latents' scale and shift and looks up
the codebook, if there is one, so no other module is needed; the encoder is left out.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from gaq_export.errors import GaqError, one_line
from gaq_export.models import weight_files
from gaq_export.models.architectures import config_of
from gaq_export.models.json_file import read_json
from gaq_export.models.network_config import check_sizes

PLACES = ("vae", "vqvae")  # sub-folders of a pipeline folder
_FACTORS = (("latents_std", 1.0), ("latents_mean", 0.0))  # fields of a config, one number a channel, and their defaults
KINDS: Mapping[str, Callable[..., nn.Module]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class LatentDecoder(nn.Module):
    """The decoding half of an autoencoder of diffusers.

        z = scale * latents + shift

    with 1 / scaling_factor and shift_factor, or latents_std / scaling_factor and latents_mean, as the config says.

    Args:
        autoencoder: One of `KINDS`, which loses its encoder.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        config: Mapping[str, Any] = autoencoder.config  # type: ignore[assignment]
        self.channels = int(config["latent_channels"])
        self.kind = type(autoencoder).__name__
        scale, shift = (_channels(config.get(name), default) for name, default in _FACTORS)
        if config.get("shift_factor") is not None:
            shift = shift + float(config["shift_factor"])
        # Buffers are part of the state, and so of the fingerprint.
        self.register_buffer("scale", scale / float(config["scaling_factor"]))
        self.register_buffer("shift", shift)
        # The encoder's weights leave the state, and with it the fingerprint and the engine.
        autoencoder.encoder = nn.Identity()
        autoencoder.quant_conv = nn.Identity()
        if self.kind == "VQModel":
            autoencoder.quantize = Nearest(autoencoder.get_parameter("quantize.embedding.weight"))
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the images of `latents`."""
        decode: Callable[..., tuple[Tensor, ...]] = self.autoencoder.decode  # type: ignore[assignment]
        return decode(self.scale * latents + self.shift, return_dict=False)[0]


class Nearest(nn.Module):
    """Replace every vector of an image by the nearest of a codebook, as a convolution and a lookup.

    |z - e|^2 = |z|^2 - 2 z e + |e|^2 is smallest where z e - |e|^2 / 2 is largest, and that is a 1x1 convolution, which
    every runtime has, unlike pairwise distances.

    Args:
        codes: The codebook, (K, C).
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(codes), codes.shape[1], _weight=codes.detach())

    def forward(self, z: Tensor) -> tuple[Tensor, None, None]:
        """Return (N, C, h, w) vectors of the codebook for `z` (N, C, h, w), and None in place of VQModel's losses."""
        codes = self.embedding.weight
        likeness = nn.functional.conv2d(z, codes[:, :, None, None], -codes.square().sum(1) / 2)  # (N, K, h, w)
        nearest: Tensor = self.embedding(likeness.argmax(1))  # (N, h, w, C)
        return nearest.movedim(3, 1), None, None


def find_decoder(folder: Path, channels: int, *, allow_pickle: bool = False) -> LatentDecoder | None:
    """Return the decoder in a pipeline folder, float32, in evaluation mode; None if it holds none.

    Args:
        folder: The pipeline folder.
        channels: Channels of the denoiser's latents.
        allow_pickle: As for `diffusers_folder.load_network`.

    Raises:
        GaqError: There are two, it is of an unknown kind, damaged, or does not fit the denoiser.
    """
    places = [folder / place for place in PLACES if (folder / place / "config.json").is_file()]
    if not places:
        return None
    if len(places) > 1:
        raise GaqError(f"{folder} holds both a {PLACES[0]}/ and a {PLACES[1]}/: remove the one that is not used.")
    decoder = load_decoder(places[0], allow_pickle=allow_pickle)
    if decoder.channels != channels:
        raise GaqError(
            f"The decoder in {places[0]} takes latents of {decoder.channels} channels, but the denoiser beside it "
            f"makes {channels}."
        )
    return decoder


def load_decoder(folder: Path, *, allow_pickle: bool = False) -> LatentDecoder:
    """Load the decoder of an autoencoder from its folder, with `config.json` and weights; see `find_decoder`."""
    file = folder / "config.json"
    config = read_json(file, "decoder's config")
    check_sizes(config, f"The decoder's config {file}")
    kind = str(config.get("_class_name"))
    if kind not in KINDS:
        raise GaqError(f"The config {file} describes a {kind!r}; decoders of {list(KINDS)} are supported.")
    known = set(inspect.signature(KINDS[kind].__init__).parameters) - {"self"}
    try:
        # The random weights are all replaced: leave the caller's random stream alone.
        with torch.random.fork_rng(devices=[]):
            autoencoder = KINDS[kind](**{name: value for name, value in config.items() if name in known})
    except Exception as error:  # it checks little of a config itself; the rest fails somewhere in the layers
        raise GaqError(f"diffusers cannot build the decoder in {file}: {one_line(error)}") from error
    weight_files.load_weights(autoencoder, folder, allow_pickle=allow_pickle)
    for name, default in _FACTORS:
        try:
            fits = _channels(config.get(name), default).shape[1] in (1, int(config_of(autoencoder)["latent_channels"]))
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise GaqError(f"The decoder's config {file} has {name} {config[name]!r}, not a number for each channel.")
    return LatentDecoder(autoencoder)


def _channels(values: Any, default: float) -> Tensor:
    """Return values of a config, one a channel or one for all, as (1, C, 1, 1)."""
    return torch.tensor([default] if values is None else values, dtype=torch.float32).reshape(1, -1, 1, 1)
