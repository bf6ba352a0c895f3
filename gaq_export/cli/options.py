"""What the commands share: their options, and how what a user can cause ends in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gaq_export.diffusion.schedule import SamplerSpec
    from gaq_export.models.loader import LoadedModel

RunFolder = Annotated[Path, typer.Option("--run", help="Folder that keeps the calibration, so that it can continue.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Local diffusers folder or pack, or 'random' (meaningless pictures, for trying build and speed)."
    ),
]
Classes = Annotated[
    str | None, typer.Option(help="Classes to draw, as 3,7 or 0-9, or all; the image of seed s is of number s mod K.")
]
Prompts = Annotated[Path | None, typer.Option(help="File of prompts, one a line; likewise.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 1 is none.")]
GraphKind = Annotated[
    str, typer.Option(help="step (whole denoising steps of one sampler) or eps (the network alone, for any sampler).")
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps, instead of the calibration's or the engine's.")]
SamplerName = Annotated[
    str | None, typer.Option(help="ddim, ddim-clipped, ddpm or dpmpp-2m, instead of the calibration's.")
]
Spacing = Annotated[str | None, typer.Option(help="uniform, quad or beta, instead of the calibration's.")]
Eta = Annotated[float | None, typer.Option(help="Noise that DDIM adds, 0 to 1.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2; let everything else show its traceback."""
    from gaq_export.errors import user_errors

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it was", err=True)
        raise typer.Exit(130) from None
    except user_errors() as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def changed(own: "SamplerSpec", **asked: object) -> "SamplerSpec | None":
    """Return `own` with what was asked for put in, None if that is nothing."""
    from dataclasses import replace

    options: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    return replace(own, **options) if options else None


def find_model(
    model: str | None,
    weights: str | None,
    classes: str | None = None,
    prompts: Path | None = None,
    guidance: float | None = None,
) -> "LoadedModel":
    """Return the model by name or folder, told what to draw, and say so if its weights mean nothing."""
    from gaq_export import pipeline
    from gaq_export.errors import GaqError
    from gaq_export.sampling.prompts import ConditioningRequest, condition_model

    if model is None and weights is None:
        raise GaqError("Give the name of a model (see `gaq-export models`), or --weights FOLDER.")
    if weights is not None and Path(weights, "pack.json").is_file():
        from gaq_export.sharing import pack

        name, weights = pack.float_model(Path(weights))
        model = model or name
    found = pipeline.load_model(model, weights)
    warn_if_meaningless(found.meaningless)
    return condition_model(found, ConditioningRequest(classes=classes, prompts=prompts, guidance=guidance))


def warn_if_meaningless(meaningless: bool) -> None:
    """Say that pictures will mean nothing, if they will."""
    if meaningless:
        typer.echo("note: random weights, so the pictures are meaningless", err=True)
