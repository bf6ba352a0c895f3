"""Drawing images in batches, and writing them down with everything needed to draw them again."""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.files import write_atomically
from engines import EngineFile
from gaq_export import images
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError

GRID_COLUMNS, WORDS = 16, 40


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` drew: images (N, C, H, W) in [-1, 1], and their PSNR in dB against the float model if compared."""

    images: Tensor
    seeds: tuple[int, ...]
    psnr_db: tuple[float, ...] | None
    seconds: float
    folder: Path
    grid: Path
    meaningless: bool


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What `sample_shards` did: `drawn` images in `seconds`; `digest` is the sha256 of all there are now."""

    folder: Path
    grid: Path
    drawn: int
    seconds: float
    digest: str


def check_writable(out: Path) -> None:
    """Make the folder `out`; raise GaqError now, rather than after the drawing, if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise GaqError(f"Cannot write to {out}: {error.strerror}. Choose a folder you may write to.") from error


def draw(
    some: Callable[[Sequence[int], Callable[[], None]], Tensor],
    seeds: Sequence[int],
    batch: int,
    steps: int,
    on_step: Callable[[int, int], None],
) -> Tensor:
    """Draw all images in batches of one size, the last one filled up, so that no image's arithmetic depends on it.

    Args:
        some: draws one image for each seed, and tells of every step.
        seeds: one per image.
        batch: images at a time.
        steps: how often `some` tells of one.
        on_step: told how many steps are done, of how many.
    """
    total = -(-len(seeds) // batch) * steps
    done = 0

    def report_step() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    parts = []
    for start in range(0, len(seeds), batch):
        rows = [*seeds[start : start + batch]]
        padded = rows + rows[-1:] * (batch - len(rows))
        parts.append(some(padded, report_step)[: len(rows)])
    return torch.cat(parts)


def provenance_record(file: EngineFile, spec: SamplerSpec, conditioning: Conditioning | None) -> dict[str, Any]:
    """Return what images of an engine depend on, but for seeds and batch."""
    about = file.about["model"]
    decoder = (file.about.get("decoder") or {}).get("engine")
    further = {} if decoder is None else {"decoder_sha256": decoder["sha256"]}
    asked = (
        {}
        if conditioning is None
        else {"told": list(conditioning.names), "guidance": conditioning.guidance, "told_sha256": conditioning.sha256}
    )
    return (
        asked
        | further
        | {
            "model": about["name"],
            "meaningless": about["meaningless"],
            "backend": file.backend,
            "bits": file.about["bits"],
            "engine_sha256": file.sha256,
            "sampler": asdict(spec),
        }
    )


def write_overview(
    out: Path, file: EngineFile, made: dict[str, Any], conditioning: Conditioning | None, first: Tensor, seeds: Tensor
) -> Path:
    """Write the grid of the first images, uint8, of a folder of shards, and return its path."""
    grid = out / "grid.png"
    row = (file.about["bits"] + "\n" + file.backend, first[:GRID_COLUMNS].float() / 127.5 - 1)
    images.save_grid(grid, [row], made, _names(conditioning, seeds.tolist()))
    return grid


def _names(conditioning: Conditioning | None, seeds: Sequence[int]) -> list[str]:
    """Return what the grid's images are told, nothing if they are told nothing."""
    return [] if conditioning is None else [conditioning.name_of(seed) for seed in seeds[:GRID_COLUMNS]]


def _stem(conditioning: Conditioning | None, seed: int) -> str:
    """Return what an image's file is called: its seed, and in short what it is told."""
    words = (
        ""
        if conditioning is None
        else re.sub(r"[^a-z0-9]+", "-", conditioning.name_of(seed).lower())[:WORDS].strip("-")
    )
    return f"{seed:06d}-{words}" if words else f"{seed:06d}"


def write(
    out: Path,
    file: EngineFile,
    spec: SamplerSpec,
    conditioning: Conditioning | None,
    seeds: tuple[int, ...],
    drawn: Tensor,
    reference: Tensor | None,
    seconds: float,
) -> Sampled:
    """Write one PNG an image, the grid and samples.json."""
    about, made = file.about["model"], provenance_record(file, spec, conditioning)
    own = [
        {"seed": seed} if conditioning is None else {"seed": seed, "told": conditioning.name_of(seed)} for seed in seeds
    ]
    psnr = None if reference is None else tuple(images.psnr(drawn, reference).tolist())
    for i, (seed, image) in enumerate(zip(seeds, drawn, strict=True)):
        images.save_png(out / f"{_stem(conditioning, seed)}.png", image, made | own[i])
        if reference is not None:
            images.save_png(
                out / f"{_stem(conditioning, seed)}-float.png", reference[i], made | {"backend": "float"} | own[i]
            )
    shown = min(len(drawn), GRID_COLUMNS)
    rows = [] if reference is None else [("float", reference[:shown])]
    grid = out / "grid.png"
    rows.append((file.about["bits"] + "\n" + file.backend, drawn[:shown]))
    images.save_grid(grid, rows, made, _names(conditioning, seeds))
    record = {
        **made,
        "seconds": round(seconds, 3),
        "images": [
            own[i]
            | {"file": f"{_stem(conditioning, s)}.png"}
            | ({} if psnr is None else {"psnr_db": round(psnr[i], 3)})
            for i, s in enumerate(seeds)
        ],
    }
    write_atomically(out / "samples.json", json.dumps(record, indent=1).encode())
    return Sampled(
        images=drawn,
        seeds=seeds,
        psnr_db=psnr,
        seconds=seconds,
        folder=out,
        grid=grid,
        meaningless=about["meaningless"],
    )
