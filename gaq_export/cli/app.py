"""The command line: each command parses its options, makes one call and prints.

Commands import what they need inside their functions, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gaq_export._version import __version__
from gaq_export.cli import build, calibrate, doctor, evaluate, sample, share


class _Commands(TyperGroup):
    """The commands; what is wrong with a command's words is one line too, and not a box of several."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and end the process, as typer does, unless `standalone_mode` is False."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.Abort:
            code = "aborted"  # printed, with exit code 1
        # What typer raises is a class of its own in some versions and click's in others, and always has this method.
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            where = f" See `{context.command_path} --help`." if context else ""
            typer.echo(f"error: {' '.join(error.format_message().split()).rstrip('.')}.{where}", err=True)
            code = 2
        sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    name="gaq-export",
    help="Quantize a diffusion model, build a low-bit engine, draw with it. Start with: gaq-export calibrate",
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
