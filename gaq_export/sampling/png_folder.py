"""Write images as PNGs, with a grid of them and a samples.json that holds all that is needed to draw them again."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.files import write_atomically
from calib.records import signed
from engines import EngineFile
from gaq_export import images
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.loop import Sampling
from gaq_export.errors import GaqError

GRID_COLUMNS = 16
NAME_LENGTH = 40  # characters of a condition in a file name


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` drew: images (N, C, H, W) in [-1, 1], and their PSNR in dB against the float model if compared.

    Images of other than one or three channels are in the file `arrays`, and there is no `grid`; else it is None.
    """

    images: Tensor
    seeds: tuple[int, ...]
    psnr_db: tuple[float, ...] | None
    seconds: float
    folder: Path
    grid: Path | None
    random_weights: bool
    arrays: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images of an engine, (N, C, H, W) in [-1, 1], and the float model's of the same seeds if it drew them too."""

    seeds: tuple[int, ...]
    images: Tensor
    reference: Tensor | None
    seconds: float


def check_writable(out: Path) -> None:
    """Make the folder `out`; raise GaqError now, rather than after the drawing, if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Permission bits alone do not say it: a disk may be mounted read-only.
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise GaqError(f"Cannot write to {out}: {error.strerror}. Choose a folder you may write to.") from error


def image_facts(file: EngineFile, sampling: Sampling) -> dict[str, Any]:
    """Return all that an engine's images depend on except seeds and batch, as JSON values."""
    record = record_of(file)
    conditioning = sampling.conditioning
    facts: dict[str, Any] = {}
    if conditioning is not None:
        facts["conditioning"] = list(conditioning.names)
        facts["guidance"] = conditioning.guidance
        facts["conditioning_sha256"] = conditioning.sha256
    if record.decoder is not None:
        facts["decoder_sha256"] = record.decoder.sha256
    return facts | {
        "model": record.provenance.name,
        "meaningless": record.provenance.random_weights,
        "backend": file.backend,
        "bits": record.bits,
        "engine_sha256": file.sha256,
        "sampler": sampling.sampler.to_json(),
    }


def write_overview(out: Path, file: EngineFile, sampling: Sampling, first: Tensor, seeds: Tensor) -> Path:
    """Write the grid of a folder of shards and return its path.

    Args:
        out: the folder.
        file: the engine.
        sampling: how its images were drawn.
        first: images of the first shard, (N, C, H, W) uint8.
        seeds: seeds of those images, (N,).
    """
    grid = out / "grid.png"
    row = (_row_title(file), first[:GRID_COLUMNS].float() / 127.5 - 1)  # bytes 0 to 255 -> [-1, 1]
    images.save_grid(grid, [row], image_facts(file, sampling), _names(sampling.conditioning, seeds.tolist()))
    return grid


def write_pngs(out: Path, file: EngineFile, sampling: Sampling, drawn: Drawn) -> Sampled:
    """Write a PNG for each image, the grid and samples.json."""
    facts = image_facts(file, sampling)
    conditioning = sampling.conditioning
    reference = drawn.reference
    psnr = None if reference is None else tuple(images.psnr(drawn.images, reference).tolist())
    rows = []
    for i, (seed, image) in enumerate(zip(drawn.seeds, drawn.images, strict=True)):
        stem = _stem(conditioning, seed)
        # PNGs carry these facts as text, so that each can be drawn again without samples.json.
        own_facts = {"seed": seed} if conditioning is None else {"seed": seed, "condition": conditioning.name_of(seed)}
        images.save_png(out / f"{stem}.png", image, facts | own_facts)
        if reference is not None:
            images.save_png(out / f"{stem}-float.png", reference[i], facts | {"backend": "float"} | own_facts)
        distance = {} if psnr is None else {"psnr_db": round(psnr[i], 3)}
        rows.append(own_facts | {"file": f"{stem}.png"} | distance)
    grid = out / "grid.png"
    shown = slice(GRID_COLUMNS)
    # The float model's row is above the engine's, so that an image and its reference share a column.
    grid_rows = [] if reference is None else [("float", reference[shown])]
    grid_rows.append((_row_title(file), drawn.images[shown]))
    images.save_grid(grid, grid_rows, facts, _names(conditioning, drawn.seeds))
    # Last: a folder with samples.json has all its pictures.
    record = {**facts, "seconds": round(drawn.seconds, 3), "images": rows}
    write_atomically(out / "samples.json", signed(record))
    return Sampled(
        images=drawn.images,
        seeds=drawn.seeds,
        psnr_db=psnr,
        seconds=drawn.seconds,
        folder=out,
        grid=grid,
        random_weights=record_of(file).provenance.random_weights,
    )


def _row_title(file: EngineFile) -> str:
    return f"{record_of(file).bits}\n{file.backend}"


def _names(conditioning: Conditioning | None, seeds: Sequence[int]) -> list[str]:
    """Return the titles of the grid's columns: each image's condition."""
    return [] if conditioning is None else [conditioning.name_of(seed) for seed in seeds[:GRID_COLUMNS]]


def _stem(conditioning: Conditioning | None, seed: int) -> str:
    """Return an image's file name without its suffix: the seed, and its condition in short."""
    name = "" if conditioning is None else conditioning.name_of(seed).lower()
    # Only characters that every file system takes.
    words = re.sub(r"[^a-z0-9]+", "-", name)[:NAME_LENGTH].strip("-")
    return f"{seed:06d}-{words}" if words else f"{seed:06d}"
