"""The command line: each command parses its options, makes one call and prints.

Commands import what they need inside their functions, so that `--help` answers at once.
"""

from typing import Annotated

import typer

from gaq_export._version import __version__
from gaq_export.cli import build, calibrate, doctor, evaluate, sample, share

app = typer.Typer(
    name="gaq-export",
    help="Quantize a diffusion model, build a low-bit engine, draw with it. Start with: gaq-export calibrate",
    no_args_is_help=True,
    add_completion=False,  # its two options would stand beside --version in the help text
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


_COMMANDS = {
    "From a float model to images": (calibrate.calibrate, build.build_engine, sample.sample),
    "Measure": (evaluate.inspect, evaluate.evaluate, evaluate.report, calibrate.compare),
    "Share and serve": (build.export, share.pack, share.push, share.pull, share.triton),
    "Information": (doctor.doctor, calibrate.recipes, calibrate.models),
}
for panel, commands in _COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
