"""Float engines of a model's decoder and text encoders, by the same backends, each checked against PyTorch.

    decoder        latents (N, C, h, w) -> images (N, 3, H, W)
    text encoder   ids (N, L) -> states (N, L, D) [, pooled (N, P)]

They compute in float32 everywhere: they run once for each image, and the activations of some decoders are too large for
FP16.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

import engines
from calib.leftovers import temporary_name
from engines import Engine, EngineConfig, EngineFile
from gaq_export.deploy import parity
from gaq_export.deploy.parity import Parity, Tolerance
from gaq_export.deploy.record import LinkedFile
from gaq_export.diffusion.batching import split_rows
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_submodel
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.precision import compute_in
from gaq_export.graph.profiles import find_profile
from gaq_export.models.text_encoder import EncodeTokens, TextEncoder

LATENTS, IMAGES, IDS = "latents", "images", "ids"
TOLERANCE = Tolerance(floor_db=40.0, margin_db=6.0)  # as for the denoiser's graphs, see `parity.TOLERANCES`


@dataclass(frozen=True, kw_only=True)
class Part:
    """The engine of a decoder or text encoder, and its parity if it runs here."""

    file: EngineFile
    parity: Parity | None


def decoder_path(out: Path) -> Path:
    """Return where the decoder of an engine's latents goes: unet-decoder.plan beside unet.plan."""
    return out.with_name(f"{out.stem}-decoder{out.suffix}")


def build_decoder(decoder: nn.Module, latents: tuple[int, ...], out: Path, config: EngineConfig) -> EngineFile:
    """Build the engine of a decoder.

    Args:
        decoder: (N, *latents) to (N, C, H, W).
        latents: their shape, (C, h, w).
        out: the engine file.
        config: the denoiser's.
    """
    return _build(export_submodel(decoder, LATENTS, torch.zeros(1, *latents), [IMAGES]), out, config, "decoder")


def check_decoder(decoder: nn.Module, file: EngineFile, latents: Tensor) -> Parity:
    """Compare a decoder's engine with PyTorch on latents that the sampler ended with; raise GaqError below the floor.

    As for quantized networks, the floor is lower where the decoder's own resolution is lower: of two codebook entries
    at nearly the same distance, either may be looked up.
    """
    with engines.open_engine(file) as opened:
        images = torch.from_numpy(opened({LATENTS: latents.numpy()})[IMAGES])
    return _checked(decoder, latents, images, file)


def text_path(out: Path, index: int) -> Path:
    """Return where a text encoder goes: unet-text.plan beside unet.plan, unet-text-2.plan for a second."""
    return out.with_name(f"{out.stem}-text{f'-{index + 1}' if index else ''}{out.suffix}")


def write_tokenizer(text: str, encoder_path: Path) -> LinkedFile:
    """Write a tokenizer, JSON of the `tokenizers` library, beside its encoder's engine; return the link to it."""
    path = encoder_path.with_name(f"{encoder_path.name}.tokens.json")
    path.write_text(text, encoding="utf-8")
    return LinkedFile(file=path.name, sha256=engines.sha256_of(path))


def build_text(encoder: TextEncoder, out: Path, config: EngineConfig) -> EngineFile:
    """Build the engine of a text encoder; arguments as for `build_decoder`."""
    # (1, L), an example for the exporter; any tokens do.
    ids = torch.arange(encoder.length)[None] % encoder.embeddings.token_embedding.num_embeddings
    graph = export_submodel(encoder, IDS, ids, encoder.outputs)
    return _build(graph, out, config, "text encoder")


def check_text(encoder: TextEncoder, file: EngineFile) -> Parity:
    """Compare a text encoder's engine with PyTorch on random tokens; raise GaqError below the floor."""
    count = file.batch[0]
    words = encoder.embeddings.token_embedding.num_embeddings
    ids = torch.randint(words, (count, encoder.length), generator=torch.Generator().manual_seed(0))
    with engines.open_engine(file) as opened:
        outputs = run_text(opened, file)(ids)
    return _checked(_Flat(encoder), ids, _flat(outputs), file)


def run_text(opened: Engine, file: EngineFile) -> EncodeTokens:
    """Return an open engine of a text encoder as a function of ids (N, L), any N, for `text_encoder.encode`."""

    def run(ids: Tensor) -> list[Tensor]:
        parts = []
        for part in split_rows({IDS: ids}, file.batch[0], file.batch[2]):
            outputs = opened({IDS: part[IDS].contiguous().numpy()})
            parts.append([torch.from_numpy(outputs[spec.name]) for spec in file.outputs])
        # Batches of (states, pooled) -> all states, all pooled, without the copies that filled the last batch up.
        return [torch.cat(tensors)[: len(ids)] for tensors in zip(*parts, strict=True)]

    return run


class _Flat(nn.Module):
    """A text encoder that returns one tensor, (N, L*D + P), for the comparison."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return _flat(self.encoder(ids))


def _flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in outputs], dim=1)  # (N, L, D), (N, P) -> (N, L*D + P)


def _build(graph: ir.Model, out: Path, config: EngineConfig, part: str) -> EngineFile:
    if find_profile(engines.find_backend(config.backend).profile).openvino_forms:
        rewrite_for_openvino(graph)
    # The record says only which part it is: the denoiser's record has everything else.
    return build_graph(graph, out, replace(config, compute="float32", stripped=False), {"part": part})


def build_graph(graph: ir.Model, out: Path, config: EngineConfig, metadata: dict[str, Any]) -> EngineFile:
    """Build the engine `out` of a float graph; its ONNX file exists only while it is built.

    It computes in `config.compute`, which for a backend that reads the types in the graph becomes the graph's.
    """
    typed = engines.find_backend(config.backend).typed
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{temporary_name(out.parent, out.name)}.") as folder:
        compute = config.compute if typed and config.compute else "float32"
        save_onnx(compute_in(graph, compute), Path(folder, "unet.onnx"))
        return engines.build(Path(folder, "unet.onnx"), out, config, metadata)


def _checked(network: nn.Module, inputs: Tensor, outputs: Tensor, file: EngineFile) -> Parity:
    # The layers whose inputs are perturbed to measure the resolution: those where runtimes add in different orders.
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        measured, resolution = parity.closeness(network, layers, (inputs,), outputs, TOLERANCE)
    result = Parity(steps=(0,), sqnr_db=(measured,), resolution_db=(resolution,), tolerance=TOLERANCE)
    if not result.passed:
        raise GaqError(
            f"The {file.backend} engine of the {file.metadata['part']} differs from PyTorch: SQNR {measured:.1f} dB, "
            f"at least {result.required_db(0):.1f} dB expected. Nothing was replaced; try another --backend."
        )
    return result
