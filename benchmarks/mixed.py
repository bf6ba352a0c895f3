r"""What is it worth to choose bits for each layer, or for each step, beside as many bits for all?

    python benchmarks/mixed.py --of weights --bits W5A8,W6A8 --data mnist.npz --folder bench-weights \
        --out docs/results/mixed-weights-ddpm-mnist.md
    python benchmarks/mixed.py --of steps --bits W4A8 --data mnist.npz --folder bench-steps \
        --out docs/results/mixed-steps-ddpm-mnist.md

Weights: every layer gets 4 or 8 bits, or stays float, so that their mean is the width of the table
(`calib.mixed_precision`).
Steps: every sampling step gets 4 bits or the activation width of the table (`calib.step_bits`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from calib.choices import BudgetUnit
from calib.config import QuantConfig
from command import command_line, one_line_errors, write_markdown
from gaq_export.comparison import runner, tables
from gaq_export.comparison.results import table_at
from gaq_export.comparison.spec import Comparison, Row, adjusted_preset, parse_bits, parse_seeds
from gaq_export.comparison.tables import Column
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from options import Folder, Iterations, Job, ModelName, PresetName, ReportOnly, Seeds, Weights, Workers

FEW = 4  # activation bits of the steps that have fewer
MEANING = {
    "one width": "all layers, and all steps, have the bits of the table",
    "own weight bits": "each layer has 4 or 8 bits, or stays float, with the bits of the table as their mean",
    "steps by SNR": f"each step has {FEW} activation bits if those leave less noise than it has itself (PTQD's rule)",
    "steps in a window": f"the last fifth of the steps has the activation bits of the table, the others {FEW} (PCR's)",
}


def _own_weights(config: QuantConfig) -> QuantConfig:
    return replace(config, mixed=replace(config.mixed, budget=float(config.weight.bits), unit=BudgetUnit.BITS))


def _own_steps(config: QuantConfig) -> QuantConfig:
    return replace(config, activation=replace(config.activation, narrower=(FEW,)))


def _window(config: QuantConfig) -> QuantConfig:
    return replace(config, activation=replace(config.activation, narrower=(FEW,), wide_window=(0.8, 1.0)))


ROWS: Mapping[str, Mapping[str, Row]] = {
    "weights": {"one width": lambda config: config, "own weight bits": _own_weights},
    "steps": {"one width": lambda config: config, "steps by SNR": _own_steps, "steps in a window": _window},
}


def main(
    of: Annotated[str, typer.Option(help="weights or steps.")],
    bits: Annotated[str, typer.Option()],
    model: ModelName = "ddpm-mnist",
    weights: Weights = None,
    data: Annotated[Path | None, typer.Option(help=".npz of real images, for the Frechet distances.")] = None,
    folder: Folder = Path("bench-mixed"),
    out: Annotated[Path, typer.Option(help="Markdown page.")] = Path("mixed.md"),
    seeds: Seeds = "0,1,2",
    preset: PresetName = "fast",
    iterations: Iterations = None,
    images: Annotated[int, typer.Option(help="Images that each network draws.")] = 64,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    job: Job = None,
) -> None:
    """Measure all cells and write the page."""
    with one_line_errors():
        if of not in ROWS:
            raise GaqError(f"Found --of {of!r}; choose one of {list(ROWS)}.")
        yardstick = Yardstick(model=load_model(model, weights), folder=folder, images=images, data=data)
        comparison = Comparison(
            yardstick=yardstick,
            preset=adjusted_preset(preset, iterations),
            rows=ROWS[of],
            bits=parse_bits(bits),
            seeds=parse_seeds(seeds),
            workers=workers,
        )
        runner.execute(comparison, job, report_only, lambda: write_page(comparison, of, out), print)


def write_page(comparison: Comparison, of: str, out: Path) -> None:
    """Write the page from the cells there are."""
    shown = _columns(comparison)
    lines = [f"# Mixed bits of {of}, {comparison.model.spec.name}", "", f"    {command_line()}", ""]
    lines += [
        *tables.how_measured(comparison, shown),
        "",
        "Rows:",
        "",
        *(f"- `{row}`: {MEANING[row]}." for row in comparison.rows),
    ]
    for w, a in comparison.bits:
        table = table_at(comparison, w, a)
        lines += ["", f"## W{w}A{a}", "", *tables.markdown(table, "row", shown, tables.float_rows(comparison, shown))]
    write_markdown([*lines, *tables.still_missing(comparison)], out)


def _columns(comparison: Comparison) -> list[Column]:
    distances = [tables.FD_REAL, tables.FD_FLOAT] if comparison.yardstick.data else []
    return [tables.SQNR, tables.WORST, tables.PSNR, *distances, tables.SECONDS, tables.SIZE, tables.WORK]


if __name__ == "__main__":
    typer.run(main)
