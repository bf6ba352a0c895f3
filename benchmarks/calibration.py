r"""What is each calibration ingredient worth? One row each: from plain rounding to aligned sample weights.

    python benchmarks/calibration.py --model ddpm-mnist --data mnist_70k.npz --folder bench-calibration \
        --out docs/results/calibration-ddpm-mnist.md

Every row is calibrated at every seed and weight width and evaluated on the same images
(`gaq_export/comparison/yardstick.py`); results gather in the folder, where the same command continues after an
interruption. `--report-only` writes the page from what is there.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import verdicts
from calib.choices import OmegaRule, RangeRule, RoundingStart
from calib.config import QuantConfig
from command import command_line, one_line_errors, write_markdown
from gaq_export.comparison import curves, runner, tables
from gaq_export.comparison.curves import Curves
from gaq_export.comparison.results import Table, table_at
from gaq_export.comparison.spec import Comparison, Row, adjusted_preset, parse_bits, parse_seeds
from gaq_export.comparison.tables import Column
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.diffusion.schedule import timesteps
from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from options import Folder, Iterations, Job, ModelName, PresetName, ReportOnly, Seeds, Weights, Workers

MAIN = (4, 8)  # the bits that the figure and the goal are about
LEARNED = "gac"  # the row whose share of the baseline's error is reported
RTN = "rtn"
MEANING = {
    RTN: "round to nearest: scales from the largest weight and the largest activation, nothing is learned",
    "gptq": "searched scales, GPTQ's rounding, nothing is learned after it",
    "uniform": "searched scales, learned rounding, every sample weighs the same",
    "random": "as `uniform`, with random sample weights",
    "mse": "as `uniform`, with sample weights learned to lower the validation error alone",
    "gac": "sample weights learned to align the gradients of the step groups too, by the surrogate",
    "gac-exact": "as `gac`, by the exact gradient",
    "fish": "as `gac`, by first-order steps from group to group",
}


def main(
    model: ModelName = "ddpm-mnist",
    weights: Weights = None,
    data: Annotated[Path | None, typer.Option(help=".npz of real images, for the Frechet distances.")] = None,
    features: Annotated[Path | None, typer.Option(help="ResNet-56 checkpoint, for 3-channel images.")] = None,
    folder: Folder = Path("bench-calibration"),
    out: Annotated[Path, typer.Option(help="Markdown page; the figure goes beside it.")] = Path("calibration.md"),
    bits: Annotated[str, typer.Option()] = "W8A8,W4A8,W4A6,W4A4,W3A8",
    rungs: Annotated[str, typer.Option()] = "rtn,uniform,random,mse,gac,gac-exact",
    seeds: Seeds = "0,1,2",
    preset: PresetName = "fast",
    iterations: Iterations = None,
    images: Annotated[int, typer.Option(help="Images that each network draws.")] = 256,
    draw: Annotated[ComputedBy, typer.Option(help="Computes the quantized networks.")] = ComputedBy.ENGINE,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    job: Job = None,
) -> None:
    """Measure all cells and write the page."""
    with one_line_errors():
        yardstick = Yardstick(
            model=load_model(model, weights),
            folder=folder,
            images=images,
            computed_by=draw,
            data=data,
            classifier=features,
        )
        comparison = Comparison(
            yardstick=yardstick,
            preset=adjusted_preset(preset, iterations),
            rows={name: rung(name) for name in rungs.split(",")},
            bits=parse_bits(bits),
            seeds=parse_seeds(seeds),
            workers=workers,
            weights_alone=True,
        )
        runner.execute(comparison, job, report_only, lambda: write_page(comparison, out), print)


def rung(name: str) -> Row:
    """Return how a rung changes the preset's config."""
    if name not in MEANING:
        raise GaqError(f"Unknown rung {name!r}. Choose from {list(MEANING)}.")
    if name == RTN:
        return _round_to_nearest
    if name == "gptq":
        return partial(_not_learned, start=RoundingStart.GPTQ)
    rule = OmegaRule(name)
    return lambda config: dataclasses.replace(config, omega=dataclasses.replace(config.omega, rule=rule))


def _not_learned(config: QuantConfig, start: RoundingStart) -> QuantConfig:
    return dataclasses.replace(
        config,
        reconstruction=dataclasses.replace(config.reconstruction, iterations=0, start=start),
        omega=dataclasses.replace(config.omega, rule=OmegaRule.UNIFORM),
    )


def _round_to_nearest(config: QuantConfig) -> QuantConfig:
    return dataclasses.replace(
        _not_learned(config, start=RoundingStart.FLOAT),
        weight=dataclasses.replace(config.weight, candidates=1),
        activation=dataclasses.replace(config.activation, rule=RangeRule.MINMAX),
    )


def write_page(comparison: Comparison, out: Path) -> None:
    """Write the page and its figure from the cells there are."""
    scores = {pair: table_at(comparison, *pair) for pair in comparison.bits}
    shown = columns(comparison)
    lines = [
        f"# What each calibration ingredient is worth, {comparison.model.spec.name}",
        "",
        f"    {command_line()}",
        "",
    ]
    lines += [*tables.how_measured(comparison, shown), "", "Rows:", ""]
    lines += [f"- `{row}`: {MEANING[row]}." for row in comparison.rows]
    lines += ["", verdicts.caution(len(comparison.seeds))]
    main_bits = MAIN if MAIN in scores else comparison.bits[0]
    for (w, a), table in scores.items():
        setting = f"W{w}A{a}"
        lines += [
            "",
            f"## {setting}",
            "",
            *tables.markdown(table, "row", shown, tables.float_rows(comparison, shown)),
            "",
        ]
        lines += [verdicts.standing(setting, table)]
        if (w, a) == MAIN and LEARNED in comparison.rows:
            lines += [line for text in verdicts.learned(setting, table, LEARNED) for line in ("", text)]
        if (w, a) == main_bits and table:
            lines += ["", f"![SQNR at every step]({_figure(comparison, out, setting, table)})"]
    lines += tables.still_missing(comparison)
    write_markdown(lines, out)


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns that were measured."""
    images = [tables.PSNR] if comparison.yardstick.images else []
    distances = [tables.FD_REAL, tables.FD_FLOAT] if images and comparison.yardstick.data else []
    noise = [tables.SQNR, tables.SQNR_LEAD, tables.POOLED, tables.WEIGHTS]
    return [*noise, *images, *distances, tables.SECONDS, tables.PEAK, tables.SPREAD]


def _figure(comparison: Comparison, out: Path, setting: str, table: Table) -> str:
    path = out.with_suffix(".svg")
    visited = timesteps(comparison.model.spec.sampler, comparison.model.schedule.num_train).tolist()
    title = f"{comparison.model.spec.name} {setting}"
    curves.draw(path, Curves(title=title, table=table, timesteps=visited, omitted=(RTN,)))
    return path.name


if __name__ == "__main__":
    typer.run(main)
