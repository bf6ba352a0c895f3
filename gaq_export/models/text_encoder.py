"""From prompts to a denoiser's condition, with the CLIP tokenizers and text encoders of a pipeline folder.

In: K prompts. Out: tensors by name, as the denoiser takes them.

    encoder_hidden_states (K, L, D)   one encoder: its last states; two, as in Stable Diffusion XL: side by side, those
                                      of the last layer but one
    text_embeds (K, P)                two encoders: the second's projection of the end of the text
    time_ids (K, 6)                   two encoders: height, width, crop (0, 0), height and width of the image in pixels

The unconditional rows are those of the empty prompt or, where `model_index.json` says so, zeros. Needs the extra
`text`.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.errors import GaqError, one_line
from gaq_export.models import hub, weight_files
from gaq_export.models.architectures import ADDED
from gaq_export.models.json_file import read_json
from gaq_export.models.loader import LoadedModel
from gaq_export.models.network_config import check_sizes
from gaq_export.models.pipeline_index import read_index
from gaq_export.models.source import SourceKind, WeightSource
from gaq_export.models.weight_files import TRANSFORMERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STATES = "encoder_hidden_states"
PLACES = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
CHUNK = 16  # prompts at a time, which bounds the memory
# Fields of a config that say how it was saved and not what the encoder is.
_NOT_OF_THE_MODEL = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path")

# ids (N, L) -> states (N, L, D) and, from the second of two encoders, a projection (N, P)
EncodeTokens = Callable[[Tensor], Sequence[Tensor]]

_log = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """A CLIP text encoder: from tokens to states and, if it is the second of two, the projection of the text's end.

    Args:
        model: One of `CLASSES`.
        pair: Whether it is one of the two encoders of Stable Diffusion XL.
    """

    hidden: Tensor

    def __init__(self, model: nn.Module, *, pair: bool) -> None:
        super().__init__()
        inner: Any = getattr(model, "text_model", model)
        config: Any = model.config
        self.length = int(config.max_position_embeddings)
        self.pair = pair
        self.end = int(config.eos_token_id)
        # The layers and not the whole model, because `forward` has its own mask and its own search for the text's end.
        self.embeddings = inner.embeddings
        self.layers = inner.encoder.layers
        self.norm = inner.final_layer_norm
        self.projection: nn.Module | None = getattr(model, "text_projection", None) if pair else None
        # No token attends to a later one: the lowest finite number is added to its score, as in transformers.
        future = torch.full((self.length, self.length), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("hidden", future[None, None], persistent=False)  # (1, 1, L, L), like attention scores
        self.eval().requires_grad_(False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors that it returns."""
        return ("states",) if self.projection is None else ("states", "pooled")

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return states (N, L, D) and perhaps a projection (N, P) for `ids` (N, L) int64."""
        x = before = self.embeddings(ids)
        for layer in self.layers:
            before, x = x, layer(x, self.hidden)  # `before` ends as the states of the last layer but one
        last = self.norm(x)
        states = before if self.pair else last
        if self.projection is None:
            return (states,)
        # Configs of the first years call token 2 the end, but mean the largest number; padding may repeat it.
        ends = ids == (ids.amax(1, keepdim=True) if self.end == 2 else self.end)
        # The first end picks its state by a product with a one-hot row, so that no index depends on data.
        countdown = ends * torch.arange(self.length, 0, -1)
        first = countdown == countdown.amax(1, keepdim=True)
        return states, self.projection((first[:, None].float() @ last)[:, 0])  # (N, 1, L) (N, L, D) -> (N, D)


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Tokenizers and encoders that turn prompts into a condition.

    Attributes:
        tokenizers: One for each encoder; they cut and pad to its length.
        encoders: One or two; each a `TextEncoder`, or an engine of one.
        zeros: Whether the unconditional rows are zeros.
        time_ids: (1, 6) of the image's size; None with one encoder.
    """

    tokenizers: "tuple[Tokenizer, ...]"
    encoders: tuple[EncodeTokens, ...]
    zeros: bool
    time_ids: Tensor | None


def encode(where: Texts | LoadedModel | Path | str, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Turn prompts into rows of a denoiser's condition, (K, ...) float32 each.

    Args:
        where: Tokenizers and encoders, or a model or pipeline folder that has some.
        prompts: K of them; one that is longer than the encoders take is cut, with a warning.

    Raises:
        GaqError: There are no prompts, no text encoders, or ones that are damaged or not supported.
    """
    texts = _find(where)
    if not prompts:
        raise GaqError("No prompts were given; give one at least.")
    outputs: list[list[Tensor]] = []  # of each encoder
    with torch.no_grad():
        for tokenizer, encoder in zip(texts.tokenizers, texts.encoders, strict=True):
            parts = [encoder(part) for part in torch.split(_ids(tokenizer, prompts), CHUNK)]
            outputs.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    rows = {STATES: torch.cat([states for states, *_ in outputs], dim=-1)}  # (K, L, D), or (K, L, D + D')
    if texts.time_ids is None:
        return rows
    return rows | dict(zip(ADDED, (outputs[-1][-1], texts.time_ids.repeat(len(prompts), 1)), strict=True))


def empty_prompt(where: Texts | LoadedModel | Path | str) -> dict[str, Tensor]:
    """Return the unconditional rows, (1, ...) each; see `encode`."""
    texts = _find(where)
    rows = encode(texts, [""])
    if not texts.zeros:
        return rows
    # The size of the image stays, since it says nothing of the text.
    return {name: row if name == "time_ids" else torch.zeros_like(row) for name, row in rows.items()}


def prompt_conditioning(
    where: Texts | LoadedModel | Path | str, prompts: Sequence[str], guidance: float = 1.0
) -> Conditioning:
    """Return prompts to draw, with guidance if it is not 1; see `encode`."""
    texts = _find(where)
    rows = encode(texts, prompts)
    return Conditioning(names=tuple(prompts), rows=rows, unconditional=empty_prompt(texts), guidance=guidance)


def load(folder: Path, *, allow_pickle: bool = False) -> Texts | None:
    """Read the tokenizers and text encoders of a pipeline folder; None if it holds none.

    Args:
        folder: With `text_encoder/` and `tokenizer/`, perhaps `text_encoder_2/` and `tokenizer_2/`.
        allow_pickle: As for `diffusers_folder.load_network`.

    Raises:
        GaqError: transformers is not installed, or an encoder is of another kind, damaged, or has no tokenizer.
    """
    present = [(folder / tokens, folder / encoder) for tokens, encoder in PLACES if (folder / encoder).is_dir()]
    if not present:
        return None
    if not installed():
        raise GaqError("Prompts need transformers: pip install 'gaq-export[text]'.")
    if (folder / PLACES[0][1]) not in present[0]:
        raise GaqError(
            f"{folder} has {PLACES[1][1]}/ and no {PLACES[0][1]}/, as a refiner of Stable Diffusion XL, which goes on "
            "from another model's latents: it is not supported."
        )
    pair = len(present) > 1
    encoders = tuple(_encoder(place, pair, allow_pickle) for _, place in present)
    if pair and encoders[1].projection is None:
        raise GaqError(f"{present[1][1]} is no {CLASSES[1]}, as a second text encoder must be.")
    index = read_index(folder)
    return Texts(
        tokenizers=tuple(
            _tokenizer(place, encoder.length) for (place, _), encoder in zip(present, encoders, strict=True)
        ),
        encoders=encoders,
        zeros=pair and bool(index.get("force_zeros_for_empty_prompt", True)),
        time_ids=_time_ids(folder) if pair else None,
    )


def installed() -> bool:
    """Return whether transformers is installed, without importing it."""
    return importlib.util.find_spec("transformers") is not None


def folder_of(source: WeightSource) -> Path | None:
    """Return the pipeline folder that weights come from, None if they come from none."""
    if source.kind is SourceKind.HUB:
        return hub.fetch(source.repository, source.commit)[0]
    return source.path if source.path is not None and source.path.is_dir() else None


def of(model: LoadedModel) -> Texts | None:
    """Return the tokenizers and text encoders in a model's folder; None if it has no folder, or none are there."""
    folder = folder_of(model.source)
    return None if folder is None else load(folder, allow_pickle=model.source.kind is SourceKind.HUB)


def _find(where: Texts | LoadedModel | Path | str) -> Texts:
    if isinstance(where, Texts):
        return where
    texts = of(where) if isinstance(where, LoadedModel) else load(Path(where))
    if texts is None:
        name = where.source if isinstance(where, LoadedModel) else where
        raise GaqError(f"{name} has no text_encoder/ beside its network: give a pipeline folder that takes prompts.")
    return texts


def _ids(tokenizer: "Tokenizer", prompts: Sequence[str]) -> Tensor:
    """Return the prompts' tokens, (K, L) int64, cut and padded."""
    encodings = tokenizer.encode_batch(list(prompts))
    for prompt, tokens in zip(prompts, encodings, strict=True):
        if tokens.overflowing:
            _log.warning("the prompt %r is longer than %d tokens, and is cut", prompt[:60], len(tokens.ids))
    return torch.tensor([tokens.ids for tokens in encodings])


def _tokenizer(folder: Path, length: int) -> "Tokenizer":
    from transformers import CLIPTokenizerFast

    try:
        read = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer: Tokenizer = read.backend_tokenizer
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=read.pad_token_id, pad_token=read.pad_token)
        tokenizer.encode("a")  # a vocabulary that lacks its special words shows only here
    except Exception as error:  # the library in Rust raises plain ones
        raise GaqError(f"No tokenizer can be read from {folder} ({one_line(error)}).") from error
    return tokenizer


def _encoder(folder: Path, pair: bool, allow_pickle: bool) -> TextEncoder:
    import transformers

    file = folder / "config.json"
    fields = read_json(file, "text encoder's config")
    check_sizes(fields, f"The text encoder's config {file}")
    named = fields.get("architectures")
    kind = named[0] if isinstance(named, list) and named else named
    if kind not in CLASSES:
        raise GaqError(f"The text encoder in {folder} is a {kind!r}; supported are {list(CLASSES)}.")
    try:
        config = transformers.CLIPTextConfig(**{k: v for k, v in fields.items() if k not in _NOT_OF_THE_MODEL})
        config._attn_implementation = "eager"  # it adds the mask of `TextEncoder` as it is
        with torch.random.fork_rng(devices=[]):  # the random weights are all replaced: leave the caller's stream alone
            model: nn.Module = getattr(transformers, kind)(config)
    except (StrictDataclassError, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise GaqError(f"transformers cannot build the text encoder in {folder}: {one_line(error)}") from error
    model = model.float()
    names = set(model.state_dict())

    def rename(name: str) -> str | None:
        """Return this version's name of a tensor; None for the positions, which older versions stored as weights."""
        if name.endswith("position_ids"):
            return None
        return name if name in names else name.removeprefix("text_model.")

    weight_files.load_weights(model, folder, allow_pickle=allow_pickle, naming=TRANSFORMERS, rename=rename)
    return TextEncoder(model, pair=pair)


def _time_ids(folder: Path) -> Tensor:
    """Return (1, 6): the image's height and width, no crop, and the size again."""
    configs = [read_json(folder / place / "config.json", f"config of the {place}") for place in ("unet", "vae")]
    for place, config in zip(("unet", "vae"), configs, strict=True):
        check_sizes(config, f"The config of the {place} in {folder}")
    size, levels = configs[0].get("sample_size"), configs[1].get("block_out_channels") or ()
    if size is None or not levels:
        raise GaqError(f"{folder} does not say how large its images are: unet/config.json or vae/config.json lack it.")
    # Each level of the decoder but one doubles the size of the latents.
    height, width = (n * 2 ** (len(levels) - 1) for n in ((size, size) if isinstance(size, int) else size))
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
