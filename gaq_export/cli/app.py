"""The command line: each command parses its options, makes one call and prints. Nothing heavy loads before it runs."""

from typing import Annotated

import typer

from gaq_export._version import __version__
from gaq_export.cli import build, calibrate, doctor, evaluate, sample, share

app = typer.Typer(
    name="gaq-export",
    help="Quantize a diffusion model, build a low-bit engine, draw with it. Start with: gaq-export calibrate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Quantize a diffusion model, build a low-bit engine, draw with it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# In the order in which a user meets them.
for command in (
    calibrate.calibrate,
    build.build_engine,
    sample.sample,
    build.export,
    evaluate.inspect,
    doctor.doctor,
    evaluate.evaluate,
    evaluate.report,
    calibrate.compare,
    calibrate.recipes,
    calibrate.models,
    share.pack,
    share.push,
    share.pull,
    share.triton,
):
    app.command()(command)
