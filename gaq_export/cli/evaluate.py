"""The commands that measure: engines or images by scores, a calibration or a whole run by one HTML page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gaq_export.cli import terminal
from gaq_export.cli.choices import EXTRACTORS
from gaq_export.cli.options import (
    DEFAULT_RUN,
    MOST_IMAGES,
    Block,
    BothDevices,
    DeviceName,
    EvaluationFolder,
    Quiet,
    Ray,
    RunArgument,
    Tf32,
    Workers,
    device_of,
    one_line_errors,
)
from gaq_export.cli.progress import Display

_MOST_SHOWN = 10_000  # on a page


def evaluate(
    images: Annotated[
        Path | None,
        typer.Argument(
            help="Images to evaluate: a folder that `sample` wrote, a folder of PNG files, or an .npz file."
        ),
    ] = None,
    reference: Annotated[Path | None, typer.Argument(help="Images to compare them with, likewise.")] = None,
    engine: Annotated[
        list[Path] | None,
        typer.Option(help="Engine to draw with and evaluate instead; may be repeated, to compare several."),
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", min=2, max=MOST_IMAGES, help="Images to draw with each engine.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".npz of real images to compare with; by default images of the float network from other noise."
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(help=f"Network that makes the features: {EXTRACTORS}, with =PATH for its weights file.")
    ] = "inception",
    workers: Workers = None,
    ray: Ray = None,
    device: BothDevices = "auto",
    tf32: Tf32 = False,
    out: Annotated[Path, typer.Option(help="Folder for images, features and evaluation.json.")] = Path("evaluation"),
    quiet: Quiet = False,
) -> None:
    """Score sets of images, and each image against the float network's from the same noise.

    The Frechet distance comes with a confidence interval, and with the distance that two sets of the same kind have by
    chance.
    """
    with one_line_errors():
        from gaq_export.devices import gpu_number
        from gaq_export.errors import GaqError
        from gaq_export.evaluation import evaluate as evaluation
        from gaq_export.evaluation.feature_extractors import find_extractor

        # Exactly one of the two forms of the command.
        if bool(engine) == bool(images and reference):
            raise GaqError("Give two sets of images, or one or more --engine.")
        extractor = find_extractor(features)
        with Display(quiet) as display:
            display.stage("reading images" if images else "building the float engine")
            if images and reference:
                result = evaluation.evaluate_sets(images, reference, extractor, out=out, on_step=display.measure)
            else:
                count = workers or os.cpu_count() or 1  # cpu_count may not know
                drawing = evaluation.DrawingOptions(
                    num=num,
                    out=out,
                    seed=seed,
                    workers=count,
                    ray=ray,
                    gpu=gpu_number(device),
                    device=device_of(device, tf32),
                )
                result = evaluation.evaluate_engines(
                    engine or [], extractor, drawing, data=data, on_step=display.measure
                )
        if not quiet:
            terminal.print_evaluation(result)
        typer.echo(result.path)


def inspect(
    run: RunArgument = DEFAULT_RUN,
    block: Block = None,
    images: Annotated[
        int, typer.Option(min=1, max=_MOST_SHOWN, help="Fresh images on which the predicted noise is compared.")
    ] = 8,
    device: DeviceName = "auto",
    tf32: Tf32 = False,
    out: Annotated[Path | None, typer.Option(help="HTML file; by default inspect.html in the run folder.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a calibration: its gradients, losses, noise and ranges."""
    with one_line_errors():
        from gaq_export import pipeline

        with Display(quiet) as display:
            display.stage("loading the model")
            place = device_of(device, tf32)
            path = pipeline.inspect(
                folder=run, out=out, block=block, images=images, device=place, on_step=display.measure
            )
        typer.echo(path)


def report(
    run: RunArgument = DEFAULT_RUN,
    engine: Annotated[
        Path | None, typer.Option(help="Engine of that calibration; by default the last one built.")
    ] = None,
    evaluation: EvaluationFolder = None,
    images: Annotated[
        int, typer.Option(min=1, max=_MOST_SHOWN, help="Images shown, and images on which the noise is compared.")
    ] = 8,
    rounds: Annotated[
        int,
        typer.Option(
            min=0, max=1000, help="How often the whole loop is timed, in turn with the float one; 0 for never."
        ),
    ] = 3,
    block: Block = None,
    device: BothDevices = "auto",
    tf32: Tf32 = False,
    out: Annotated[Path | None, typer.Option(help="HTML file; by default report.html in the run folder.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about an engine: images, noise, size, arithmetic, speed, and what is inside its plan."""
    with one_line_errors():
        from gaq_export.devices import gpu_number
        from gaq_export.report.inspection import InspectionOptions
        from gaq_export.report.report import ReportOptions
        from gaq_export.report.write import write_report

        with Display(quiet) as display:
            display.stage("loading the model")
            inspection = InspectionOptions(block=block, images=images)
            options = ReportOptions(
                engine=engine,
                evaluation=evaluation,
                inspection=inspection,
                rounds=rounds,
                gpu=gpu_number(device),
                device=device_of(device, tf32),
            )
            path = write_report(folder=run, out=out, options=options, on_step=display.measure)
        typer.echo(path)
