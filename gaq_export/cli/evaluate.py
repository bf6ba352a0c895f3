"""The commands that judge: engines or images by figures, and a run by one page with everything in it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gaq_export.cli import terminal
from gaq_export.cli.options import Quiet, one_line_errors


def evaluate(
    found: Annotated[Path | None, typer.Argument(help="Images to judge: a folder of `sample`, PNGs, or .npz.")] = None,
    reference: Annotated[Path | None, typer.Argument(help="What they should be like, likewise.")] = None,
    engine: Annotated[
        list[Path] | None, typer.Option(help="Engine to draw with and judge instead; several stand side by side.")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=2, help="Images to draw with each engine.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the first image.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help=".npz of real images to judge by; the float network's from other noise if none.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="digits[=PATH], resnet56=PATH, inception[=PATH] or inception-clean[=PATH].")
    ] = "inception",
    workers: Annotated[int | None, typer.Option(help="Processes that draw; as many as cores by default.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that draws instead, or local.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for images, features and evaluation.json.")] = Path("evaluation"),
    quiet: Quiet = False,
) -> None:
    """Judge images as a whole, and against the float network's from the same noise, with floors and intervals."""
    with one_line_errors():
        from gaq_export.errors import GaqError
        from gaq_export.evaluation import evaluate as judging
        from gaq_export.evaluation.feature_extractors import find_extractor

        if bool(engine) == bool(found and reference):
            raise GaqError("Give two sets of images, or one or more --engine.")
        extractor = find_extractor(features)
        with terminal.Bars(quiet) as bars:
            if found and reference:
                result = judging.evaluate_sets(found, reference, extractor, out=out, on_step=bars.inspect)
            else:
                result = judging.evaluate_engines(
                    engine or [],
                    extractor,
                    num=num,
                    out=out,
                    seed=seed,
                    data=data,
                    workers=workers or os.cpu_count() or 1,
                    ray=ray,
                    on_step=bars.inspect,
                )
        if not quiet:
            terminal.print_evaluation(result)
        typer.echo(result.path)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished calibration.")] = Path("gaq-run"),
    engine: Annotated[Path | None, typer.Option(help="Engine of that calibration; the last one built if none.")] = None,
    judged: Annotated[
        Path | None,
        typer.Option("--evaluation", help="Folder that `evaluate` wrote; evaluation, if it is about this engine."),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures shown, and images on which the noise is compared.")] = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Whole loops timed, in turn with float; 0 for no timing.")] = 3,
    block: Annotated[str | None, typer.Option(help="Block to look into, as for `inspect`.")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; report.html in the run folder by default.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on an engine: its pictures, noise, size, arithmetic, speed, and what is inside its plan."""
    with one_line_errors():
        from calib.files import write_atomically
        from gaq_export.report import report, report_page
        from gaq_export.run import Run

        path = out or Run(folder=run).report
        with terminal.Bars(quiet) as bars:
            found = report.measure(
                run,
                path,
                engine=engine,
                judged=judged,
                block=block,
                images=images,
                rounds=rounds,
                on_step=bars.inspect,
            )
        write_atomically(path, report_page.render(found).encode())
        typer.echo(path)
