"""Check the numbers in a network's config before anything is built of them.

In: the fields of a `config.json`, of a denoiser, a decoder or a text encoder. Out: nothing, or an error that names the
field. A wrong size would otherwise fail somewhere in a constructor, or never end: a network of a million layers takes
hours to build, and no memory holds images of 10^9 pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from gaq_export.errors import GaqError
from gaq_export.models.json_file import checked

_LEVELS = 16  # of a network
_BLOCKS = 4096  # of a network, in all its levels
_NUMBER = 10**6  # of any field that is no size


def _whole(most: int, *, each_level: bool = False, sizes: bool = False) -> Callable[[Any], Any]:
    """Return what checks that a value is None, or a whole number from 1 to `most`.

    Args:
        most: the largest.
        each_level: or a list of such numbers, one for each level.
        sizes: or a list of two, height and width.
    """
    expected = f"a whole number from 1 to {most}"
    expected += ", or one for each level" if each_level else ", or two of them" if sizes else ""

    def fits(value: Any) -> bool:
        if isinstance(value, list):
            return each_level and len(value) <= _LEVELS and all(map(fits, value)) and len(value) > 0
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    def check(value: Any) -> Any:
        two = sizes and isinstance(value, list) and len(value) == 2 and all(map(fits, value))
        if value is not None and not two and not fits(value):
            raise ValueError(expected)
        return value

    return check


def _number(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _NUMBER):
        raise ValueError(f"a number up to {_NUMBER}")
    return value


def _names(value: Any) -> Any:
    named = isinstance(value, list) and all(isinstance(name, str) for name in value) and 0 < len(value) <= _LEVELS
    if value is not None and not named:
        raise ValueError(f"a list of 1 to {_LEVELS} names, one for each level")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("the name of a class")
    return value


_Width = Annotated[Any, AfterValidator(_whole(1 << 20))]
_Widths = Annotated[Any, AfterValidator(_whole(1 << 20, each_level=True))]
_Depth = Annotated[Any, AfterValidator(_whole(512))]
_Depths = Annotated[Any, AfterValidator(_whole(512, each_level=True))]
_Names = Annotated[Any, AfterValidator(_names)]
_Number = Annotated[Any, AfterValidator(_number)]


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Fields of configs, most of which say how large a network is; none has all, and diffusers checks the rest."""

    class_name: Annotated[Any, Field(alias="_class_name"), AfterValidator(_text)] = ""
    # of denoisers and decoders
    sample_size: Annotated[Any, AfterValidator(_whole(1 << 16, sizes=True))] = None
    in_channels: _Width = None
    out_channels: _Width = None
    latent_channels: _Width = None
    block_out_channels: _Widths = None
    down_block_types: _Names = None
    up_block_types: _Names = None
    layers_per_block: _Depths = None
    transformer_layers_per_block: _Depths = None
    norm_num_groups: _Width = None
    attention_head_dim: _Widths = None
    num_attention_heads: _Widths = None
    cross_attention_dim: _Widths = None
    addition_time_embed_dim: _Width = None
    projection_class_embeddings_input_dim: _Width = None
    num_class_embeds: _Width = None
    num_embeds_ada_norm: _Width = None
    classes: _Width = None
    num_layers: _Depth = None
    patch_size: _Width = None
    num_vq_embeddings: _Width = None
    vq_embed_dim: _Width = None
    # read when the network runs, and not when it is built
    norm_eps: _Number = None
    freq_shift: _Number = None
    dropout: _Number = None
    mid_block_scale_factor: _Number = None
    resnet_out_scale_factor: _Number = None
    downsample_padding: _Number = None
    scaling_factor: _Number = None
    shift_factor: _Number = None
    # of text encoders
    layer_norm_eps: _Number = None
    vocab_size: _Width = None
    hidden_size: _Width = None
    intermediate_size: _Width = None
    num_hidden_layers: _Depth = None
    max_position_embeddings: _Width = None
    projection_dim: _Width = None
    eos_token_id: _Width = None


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Raise GaqError, naming `where`, if the sizes in a config are no sizes, or beyond any network that there is."""
    sizes = checked(NetworkSizes, dict(fields), where)
    levels = len(sizes.block_out_channels) if isinstance(sizes.block_out_channels, list) else 1
    blocks = levels * _most(sizes.layers_per_block) * _most(sizes.transformer_layers_per_block)
    if blocks > _BLOCKS:
        raise GaqError(
            f"{where} describes {blocks} blocks (levels times layers_per_block times transformer_layers_per_block); "
            f"{_BLOCKS} at most are supported. Correct it."
        )


def _most(value: Any) -> int:
    return max(value) if isinstance(value, list) else int(value or 1)
