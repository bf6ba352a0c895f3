"""The options that several benchmarks share."""

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Option("--model")]
Weights = Annotated[str | None, typer.Option(help="Folder, or 'random'.")]
Folder = Annotated[Path, typer.Option(help="Where results gather.")]
Out = Annotated[Path | None, typer.Option(help="Markdown page; printed if not given.")]
Seeds = Annotated[str, typer.Option("--seeds")]
PresetName = Annotated[str, typer.Option("--preset")]
Iterations = Annotated[int | None, typer.Option(help="Iterations a block, in place of the preset's.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes beside each other.")]
ReportOnly = Annotated[bool, typer.Option("--report-only", help="Write the page from what is there.")]
Job = Annotated[str | None, typer.Option(hidden=True)]
