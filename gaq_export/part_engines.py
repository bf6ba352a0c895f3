"""Float engines of what stands around a denoiser, by the same backends: checked against PyTorch, named in its record.

    latents (N, C, h, w) -> images (N, 3, H, W)

They compute in float32 everywhere: they run once an image, and some decoders' numbers are too large for FP16.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

import engines
from engines import EngineConfig, EngineFile
from gaq_export import parity
from gaq_export.errors import GaqError
from gaq_export.half import compute_in
from gaq_export.onnx_export import export_part
from gaq_export.opening import open_up
from gaq_export.parity import Parity, Tolerance
from gaq_export.profiles import find_profile
from gaq_export.qdq import save_onnx

LATENTS, IMAGES = "latents", "images"
TOLERANCE = Tolerance(floor_db=40.0, margin_db=6.0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part's engine, and its parity if it runs here."""

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
    return _build(export_part(decoder, LATENTS, torch.zeros(1, *latents), [IMAGES]), out, config, "decoder")


def check_decoder(decoder: nn.Module, file: EngineFile, latents: Tensor) -> Parity:
    """Compare a decoder's engine with PyTorch on latents that the sampler ended with; raise GaqError below the floor.

    As for quantized networks, the floor is lower where the decoder's own resolution is: a code that is looked up may be
    another if two are nearly as near.
    """
    layers = [name for name, module in decoder.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with engines.open_engine(file) as opened:
        found = torch.from_numpy(opened({LATENTS: latents.numpy()})[IMAGES])
    return _checked(decoder, layers, latents, found, file)


def _build(graph: ir.Model, out: Path, config: EngineConfig, part: str) -> EngineFile:
    if find_profile(engines.find_backend(config.backend).profile).opened:
        open_up(graph)
    onnx = out.with_name(f".{out.name}.onnx")
    try:
        save_onnx(compute_in(graph, "float32"), onnx)
        about: dict[str, Any] = {"part": part}
        return engines.build(onnx, out, replace(config, compute="float32", stripped=False), about)
    finally:
        onnx.unlink(missing_ok=True)


def _checked(network: nn.Module, layers: Iterable[str], given: Tensor, found: Tensor, file: EngineFile) -> Parity:
    with torch.no_grad():
        measured, resolution = parity.closeness(network, tuple(layers), (given,), found, TOLERANCE)
    result = Parity(steps=(0,), sqnr_db=(measured,), resolution_db=(resolution,), tolerance=TOLERANCE)
    if not result.passed:
        raise GaqError(
            f"The {file.backend} engine of the {file.about['part']} differs from PyTorch: SQNR {measured:.1f} dB, at "
            f"least {result.required_db(0):.1f} dB expected. Nothing was replaced; try another --backend."
        )
    return result
