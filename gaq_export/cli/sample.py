"""The command that draws images with an engine, a few as PNG files or many as files of many."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaq_export.cli.options import (
    MOST_BATCH,
    MOST_IMAGES,
    BothDevices,
    Classes,
    Eta,
    Guidance,
    Prompts,
    Quiet,
    Ray,
    SamplerName,
    Spacing,
    Steps,
    Tf32,
    Workers,
    device_of,
    one_line_errors,
    replace_options,
    warn_if_meaningless,
)
from gaq_export.cli.progress import Display

if TYPE_CHECKING:
    from collections.abc import Sequence

_PNGS = 1000  # more images than this are written to files of many
_SHARD = 256  # images in such a file
_DRAWING = "Drawing"


def sample(
    engine: Annotated[Path, typer.Option(help="The engine file.")] = Path("unet.plan"),
    num: Annotated[
        int, typer.Option("--num", "-n", min=1, max=MOST_IMAGES, help="Number of images.", rich_help_panel=_DRAWING)
    ] = 16,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the next has the next seed.", rich_help_panel=_DRAWING)
    ] = 0,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_BATCH, help="Images at a time; by default the engine's best.", rich_help_panel=_DRAWING
        ),
    ] = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Draw with the float model too, and show both side by side.", rich_help_panel=_DRAWING
        ),
    ] = False,
    shard: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Write files of this many images, as they are drawn; the same command continues after a stop. By "
            f"default one PNG for each image, or from {_PNGS + 1} images on {_SHARD} images a file.",
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    workers: Workers = None,
    ray: Ray = None,
    device: BothDevices = "auto",
    tf32: Tf32 = False,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    quiet: Quiet = False,
) -> None:
    """Draw images with an engine: as PNG files, a grid of them and samples.json, or as files of many images.

    Images of other than one or three channels go to images.npz.
    """
    with one_line_errors():
        import os
        from dataclasses import replace

        import engines
        from gaq_export import pipeline
        from gaq_export.deploy.record import record_of
        from gaq_export.devices import ON_HOST, gpu_number
        from gaq_export.errors import GaqError
        from gaq_export.models.conditioning_request import ConditioningRequest
        from gaq_export.sampling.prompts import condition_engine

        many = num > _PNGS or shard is not None or workers is not None or ray is not None
        if many and compare:
            raise GaqError(
                f"--compare writes a PNG for each image: --num {_PNGS} at most, and no --shard, --workers or --ray."
            )
        gpu = gpu_number(device)
        # An engine needs no GPU of PyTorch's.
        place = device_of(device, tf32) if compare else ON_HOST
        file = engines.load_engine_file(engine)
        recorded = record_of(file).provenance
        # Of the engine's record, so that an option changes one thing and the rest is as calibrated.
        spec = replace_options(recorded.sampler, steps=steps, name=sampler, spacing=spacing, eta=eta)
        with Display(quiet) as display:
            display.stage("loading the engine")
            request = ConditioningRequest(classes=classes, prompts=prompts, guidance=guidance)
            conditioning = condition_engine(replace(file, gpu=gpu), request)
            if many:
                # Processes would take turns on one GPU, each with a copy of the engine in it.
                cores = 1 if engines.find_backend(file.backend).on_gpu else os.cpu_count() or 1
                streamed = pipeline.sample_shards(
                    engine,
                    num=num,
                    seed=seed,
                    batch=batch,
                    sampler=spec,
                    out=out,
                    shard=_SHARD if shard is None else shard,
                    conditioning=conditioning,
                    workers=cores if workers is None else workers,
                    ray=ray,
                    gpu=gpu,
                    on_images=display.images,
                )
            else:
                sampled = pipeline.sample(
                    engine,
                    num=num,
                    seed=seed,
                    batch=batch,
                    sampler=spec,
                    out=out,
                    compare=compare,
                    conditioning=conditioning,
                    gpu=gpu,
                    device=place,
                    on_step=display.draw,
                )
        warn_if_meaningless(recorded.random_weights)
        if many:
            digest = streamed.digest[:16]
            typer.echo(f"{streamed.drawn} of {num} images in {streamed.seconds:.1f} s, sha256 {digest} -> {out}")
            return
        where = sampled.grid or sampled.arrays
        typer.echo(f"{num} images in {sampled.seconds:.1f} s ({num / sampled.seconds:.2f} images/s) -> {where}")
        if sampled.arrays is not None:
            typer.echo(f"They have {sampled.images.shape[1]} channels, which no PNG holds: `images` in that file.")
        if sampled.psnr_db is not None:
            typer.echo(f"PSNR against float from the same noise: {_spread(sampled.psnr_db)}")


def _spread(decibels: "Sequence[float]") -> str:
    """Return a phrase with the median and the smallest value."""
    ordered = sorted(decibels)
    return f"median {ordered[len(ordered) // 2]:.1f} dB, worst {ordered[0]:.1f} dB"
