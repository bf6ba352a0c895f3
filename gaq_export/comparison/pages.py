"""Which recipe for this model and these bits? Calibrate with each, judge all by the same yardstick, write one page.

Every recipe is a row of a table, calibrated at every seed; what is finished is kept, so that the same command goes on
where it was, and another recipe, seed or width is added to what is there.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from calib.files import read_safetensors, write_atomically
from gaq_export.comparison import runner, tables
from gaq_export.comparison import yardstick as measures
from gaq_export.comparison.results import Table, table_at
from gaq_export.comparison.spec import Cell, Comparison
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.images import save_grid
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import Preset
from gaq_export.quantize.recipes import RECIPES, find_recipe
from gaq_export.report import html

WORST = "rtn"  # too far from the others to be drawn beside them


@dataclass(frozen=True, kw_only=True)
class Pages:
    """What a comparison writes: one page to look at, and one to read in a terminal or a repository."""

    html: Path
    markdown: Path


def comparison(
    model: LoadedModel,
    recipes: Sequence[str],
    schedule: Preset,
    *,
    bits: Sequence[tuple[int, int]],
    seeds: int,
    folder: Path,
    images: int,
    sampler: SamplerSpec | None = None,
    data: Path | None = None,
    features: Path | None = None,
    workers: int = 1,
) -> Comparison:
    """Return what is to be measured.

    Args:
        model: the float model.
        recipes: names.
        schedule: the preset that every recipe changes.
        bits: (weight, activation) widths, a table each.
        seeds: how many, from 0.
        folder: where results gather.
        images: how many each network draws.
        sampler: the model's own if None.
        data: .npz of real images for Frechet distances, left out if None.
        features: checkpoint of a ResNet-56, for three-channel images.
        workers: calibrations beside each other, one thread each.

    Raises:
        GaqError: an unknown recipe, or data without what it needs.
    """
    if sampler is not None:
        model = replace(model, spec=replace(model.spec, sampler=sampler))
    yardstick = Yardstick(model=model, folder=folder, images=images, draw="engine", data=data, classifier=features)
    return Comparison(
        yardstick=yardstick,
        schedule=schedule,
        rows={name: find_recipe(name).apply for name in recipes},
        bits=tuple(bits),
        seeds=tuple(range(seeds)),
        workers=workers,
    )


def command_line(words: Sequence[str]) -> str:
    """Return the command to show, without the folders of files from elsewhere."""
    split = [word.rpartition("=") for word in words if word != "--report-only"]
    short = [head + sep + (Path(tail).name if Path(tail).is_absolute() else tail) for head, sep, tail in split]
    return shlex.join(["gaq-export", *short])


def write_pages(bench: Comparison, command: str, pages: Pages) -> None:
    """Write both pages from the cells there are.

    Args:
        bench: what was measured.
        command: as it was given.
        pages: where to.
    """
    head = f"Recipes for {bench.model.spec.name}"
    shown = _columns(bench)
    said = tables.circumstances(bench, shown)
    recipes = [f"- {name}: {RECIPES[name].description}." for name in bench.rows]
    lines = [f"# {head}", "", f"    {command}", "", *said, "", "Recipes:", "", *recipes]
    sections = []
    for w, a in bench.bits:
        found, setting = table_at(bench, w, a), f"W{w}A{a}"
        if not found:
            continue
        figure = pages.markdown.with_name(f"{pages.markdown.stem}-{setting.lower()}")
        grid = _draw_grid(bench, found, w, a, figure.with_suffix(".png"))
        _draw_curves(bench, found, setting, figure.with_suffix(".svg"))
        lines += [
            "",
            f"## {setting}",
            "",
            *tables.markdown(found, "recipe", shown, tables.float_rows(bench, shown)),
            "",
        ]
        lines += [tables.ranking(found), "", f"![SQNR at every step]({figure.name}.svg)"]
        lines += ["", f"![Images from the same noise]({figure.name}.png)"] if grid else []
        sections.append(_section(bench, found, setting, shown, figure, grid=grid))
    lines += tables.still_missing(bench)
    details = "".join(html.text(line.removeprefix("- ")) for line in (*said, *recipes))
    details = f"<details><summary>How this was measured, and what the recipes are</summary>\n{details}</details>\n"
    header = html.header("Which recipe?", head, "", f"<pre>{escape(command)}</pre>\n", details)
    write_atomically(pages.markdown, ("\n".join(lines) + "\n").encode())
    write_atomically(pages.html, html.document(head, header, sections).encode())


def _columns(bench: Comparison) -> list[tables.Column]:
    """Return the columns that were measured."""
    images = [tables.PSNR] if bench.yardstick.images else []
    distances = [tables.FD_REAL, tables.FD_FLOAT] if images and bench.yardstick.data else []
    return [tables.SQNR, tables.WORST, *images, *distances, tables.SECONDS, tables.SIZE, tables.WORK]


def _section(
    bench: Comparison, found: Table, setting: str, shown: Sequence[tables.Column], figure: Path, *, grid: bool
) -> str:
    """Return the HTML of one setting of bits."""
    svg = figure.with_suffix(".svg").read_text(encoding="utf-8")
    rows = [*tables.rows(found, shown), *tables.float_rows(bench, shown)]
    parts = [
        html.table(["recipe", *(c.title for c in shown)], [[cell.strip("`") for cell in row] for row in rows]),
        html.text(tables.ranking(found).replace("`", "")),
        html.figure(svg[svg.index("<svg") :], "SQNR of the predicted noise at every sampling step, mean over seeds."),
    ]
    if grid:
        picture = html.picture(figure.with_suffix(".png").read_bytes(), "Images of every recipe")
        parts.append(html.figure(picture, "Images from the same noise, seed 0."))
    return html.section(setting, *parts)


def _draw_curves(bench: Comparison, found: Table, setting: str, path: Path) -> None:
    visited = timesteps(bench.model.spec.sampler, bench.model.schedule.num_train).tolist()
    baseline = "adaround" if "adaround" in found else next(iter(found))
    tables.curves(path, f"{bench.model.spec.name} {setting}", found, visited, far=(WORST,), baseline=baseline)


def _draw_grid(bench: Comparison, found: Table, wbits: int, abits: int, path: Path) -> bool:
    """Draw the float network's images and those of every recipe, a row each; return whether there are any."""
    if not bench.yardstick.images:
        return False
    rows = [("float", measures.float_pictures(bench.yardstick)[: runner.SHOWN])]
    for name in found:
        kept = runner.pictures_path(bench, Cell(row=name, seed=bench.seeds[0], wbits=wbits), abits)
        if kept.is_file():
            rows.append((name, read_safetensors(kept)[1]["images"]))
    save_grid(path, rows)
    return True
