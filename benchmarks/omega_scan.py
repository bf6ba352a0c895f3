"""How much do the settings of the sample weights matter? As `calibration.py`, but one row a variant, W4A8.

    python benchmarks/omega_scan.py --model ddpm-mnist --folder bench-omega --out docs/results/omega-scan-ddpm-mnist.md

No images are drawn: the predicted noise varies far less by chance, so that variants can be compared.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import verdicts
from calib.config import QuantConfig
from command import command_line, one_line_errors, write_markdown
from gaq_export.comparison import runner, tables
from gaq_export.comparison.results import table_at
from gaq_export.comparison.spec import Comparison, Row, adjusted_preset, parse_seeds
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from options import Folder, Iterations, Job, ModelName, PresetName, ReportOnly, Seeds, Weights, Workers

BITS = (4, 8)

# Name and what it changes in the preset's OmegaConfig. The first scan started from other settings than today's preset.
FIRST: Mapping[str, Any] = {"softmax": "batch", "meta_learning_rate": 0.01, "inner_step": 0.01}
FASTER: Mapping[str, Any] = {**FIRST, "meta_learning_rate": 0.1, "inner_step": 0.1}
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("uniform", {"rule": "uniform"}),
    ("random", {**FIRST, "rule": "random"}),
    ("gac", FIRST),
    ("rate-0.1", {**FIRST, "meta_learning_rate": 0.1}),
    ("rate-0.1-inner-0.1", FASTER),
    ("rate-0.3-inner-1", {**FIRST, "meta_learning_rate": 0.3, "inner_step": 1.0}),
    ("set-rate-0.1-inner-0.1", {**FASTER, "softmax": "set"}),
    ("steps-24", {**FASTER, "meta_steps": 24, "meta_learning_rate": 0.05}),
    ("cold-0.2", {**FASTER, "temperature": 0.2}),
    ("groups-2", {**FASTER, "groups": 2}),
    ("validation-20", {**FASTER, "validation": 0.2}),
)

COLUMNS = (tables.SQNR, tables.SQNR_LEAD, tables.WEIGHTS, tables.WEIGHTS_LEAD, tables.SPREAD, tables.SECONDS)


def main(
    model: ModelName = "ddpm-mnist",
    weights: Weights = None,
    folder: Folder = Path("bench-omega"),
    out: Annotated[Path, typer.Option(help="Markdown page.")] = Path("omega-scan.md"),
    variants: Annotated[str, typer.Option(help="Names, with commas between them; all if empty.")] = "",
    seeds: Seeds = "0,1,2",
    preset: PresetName = "fast",
    iterations: Iterations = None,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    job: Job = None,
) -> None:
    """Measure all variants and write the page."""
    with one_line_errors():
        yardstick = Yardstick(model=load_model(model, weights), folder=folder, images=0, computed_by=ComputedBy.PYTORCH)
        comparison = Comparison(
            yardstick=yardstick,
            preset=adjusted_preset(preset, iterations),
            rows=chosen(variants),
            bits=(BITS,),
            seeds=parse_seeds(seeds),
            workers=workers,
            weights_alone=True,
        )
        runner.execute(comparison, job, report_only, lambda: write_page(comparison, out), print)


def chosen(names: str) -> dict[str, Row]:
    """Return how each of the named variants changes the preset's config."""
    known = dict(VARIANTS)
    wanted = names.split(",") if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise GaqError(f"Unknown variant {unknown[0]!r}. Choose from {list(known)}.")
    return {name: changed(known[name]) for name in wanted}


def changed(fields: Mapping[str, Any]) -> Row:
    """Return the row that replaces `fields` of the OmegaConfig."""

    def row(config: QuantConfig) -> QuantConfig:
        return dataclasses.replace(config, omega=dataclasses.replace(config.omega, **fields))

    return row


def write_page(comparison: Comparison, out: Path) -> None:
    """Write the page from the cells there are."""
    table = table_at(comparison, *BITS)
    lines = [f"# Settings of the sample weights, {comparison.model.spec.name} W4A8", "", f"    {command_line()}", ""]
    lines += [*tables.how_measured(comparison, COLUMNS), "", verdicts.caution(len(comparison.seeds)), ""]
    words = {name: f"`{name}`" + "".join(f", {k} {v}" for k, v in fields.items()) for name, fields in VARIANTS}
    lines += [*tables.markdown(table, "variant, what it changes", COLUMNS, words=words), ""]
    lines += [verdicts.standing("W4A8", table), *tables.still_missing(comparison)]
    write_markdown(lines, out)


if __name__ == "__main__":
    typer.run(main)
