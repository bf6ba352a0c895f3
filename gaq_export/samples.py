"""Drawing images in batches, and writing them down with everything needed to draw them again."""

import json
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
from gaq_export.errors import GaqError
from gaq_export.schedule import SamplerSpec

GRID_COLUMNS = 16


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

    def tell() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    parts = []
    for start in range(0, len(seeds), batch):
        rows = [*seeds[start : start + batch]]
        padded = rows + rows[-1:] * (batch - len(rows))
        parts.append(some(padded, tell)[: len(rows)])
    return torch.cat(parts)


def conditions(file: EngineFile, spec: SamplerSpec) -> dict[str, Any]:
    """Return what images of an engine depend on, but for seeds and batch."""
    about = file.about["model"]
    decoder = (file.about.get("decoder") or {}).get("engine")
    further = {} if decoder is None else {"decoder_sha256": decoder["sha256"]}
    return further | {
        "model": about["name"],
        "meaningless": about["meaningless"],
        "backend": file.backend,
        "bits": file.about["bits"],
        "engine_sha256": file.sha256,
        "sampler": asdict(spec),
    }


def write_overview(out: Path, file: EngineFile, made: dict[str, Any], first: Tensor) -> Path:
    """Write the grid of the first images, uint8, of a folder of shards, and return its path."""
    grid = out / "grid.png"
    row = (file.about["bits"] + "\n" + file.backend, first[:GRID_COLUMNS].float() / 127.5 - 1)
    images.save_grid(grid, [row], made)
    return grid


def write(
    out: Path,
    file: EngineFile,
    spec: SamplerSpec,
    seeds: tuple[int, ...],
    drawn: Tensor,
    reference: Tensor | None,
    seconds: float,
) -> Sampled:
    """Write one PNG an image, the grid and samples.json."""
    about, made = file.about["model"], conditions(file, spec)
    psnr = None if reference is None else tuple(images.psnr(drawn, reference).tolist())
    for i, (seed, image) in enumerate(zip(seeds, drawn, strict=True)):
        images.save_png(out / f"{seed:06d}.png", image, {**made, "seed": seed})
        if reference is not None:
            images.save_png(out / f"{seed:06d}-float.png", reference[i], {**made, "backend": "float", "seed": seed})
    shown = min(len(drawn), GRID_COLUMNS)
    rows = [] if reference is None else [("float", reference[:shown])]
    grid = out / "grid.png"
    images.save_grid(grid, [*rows, (file.about["bits"] + "\n" + file.backend, drawn[:shown])], made)
    record = {
        **made,
        "seconds": round(seconds, 3),
        "images": [
            {"seed": s, "file": f"{s:06d}.png"} | ({} if psnr is None else {"psnr_db": round(psnr[i], 3)})
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
