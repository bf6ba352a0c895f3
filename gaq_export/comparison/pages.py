"""The pages of a comparison of recipes: one Markdown and one HTML page, a table, curves and images for each width."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.files import write_atomically
from gaq_export.comparison import curves, runner, tables, yardstick
from gaq_export.comparison.results import Table, table_at
from gaq_export.comparison.spec import Bits, Cell, Comparison
from gaq_export.diffusion.schedule import timesteps
from gaq_export.errors import visible
from gaq_export.images import save_grid
from gaq_export.quantize.recipes import RECIPES
from gaq_export.report import html
from gaq_export.report.markdown import plain

WORST = "rtn"  # so far from the others that its curve would flatten theirs


@dataclass(frozen=True, kw_only=True)
class PagePaths:
    """Where a comparison writes: a page to look at, and one to read in a terminal or a repository."""

    html: Path
    markdown: Path


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of bits: its name such as W4A8, its scores, and its pictures, `images` None if none were drawn."""

    name: str
    table: Table
    curves: Path
    images: Path | None


def page_paths(folder: Path, model: str) -> PagePaths:
    """Return the pages of a comparison of a model, in a folder; of the name only what every file system takes stays."""
    name = f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)[:80]}"
    return PagePaths(html=folder / f"{name}.html", markdown=folder / f"{name}.md")


def command_line(words: Sequence[str]) -> str:
    """Return the command to show on a page; of an absolute path, only the file name, since it is this machine's."""
    # "--option=PATH" -> ("--option", "=", "PATH"); a bare word is all tail.
    split = [word.rpartition("=") for word in words if word != "--report-only"]
    short = [head + sep + (Path(tail).name if Path(tail).is_absolute() else tail) for head, sep, tail in split]
    return shlex.join(["gaq-export", *short])


def write_pages(comparison: Comparison, command: str, paths: PagePaths) -> None:
    """Write both pages from the cells measured so far; the pictures lie beside the Markdown page.

    Args:
        comparison: what was measured.
        command: as the user gave it.
        paths: where to write.
    """
    title = f"Recipes for {comparison.model.spec.name}"
    columns = _columns(comparison)
    method = tables.how_measured(comparison, columns)
    recipes = [f"- {name}: {RECIPES[name].description}." for name in comparison.rows]
    settings = [s for s in (_draw_setting(comparison, bits, paths) for bits in comparison.bits) if s is not None]

    lines = [f"# {plain(title)}", "", f"    {visible(command)}", ""]
    lines += [*tables.how_measured(comparison, columns, plain), "", "Recipes:", "", *recipes]
    for setting in settings:
        lines += _markdown_section(comparison, setting, columns)
    lines += tables.still_missing(comparison)
    write_atomically(paths.markdown, ("\n".join(lines) + "\n").encode())

    details = "".join(html.text(line.removeprefix("- ")) for line in (*method, *recipes))
    details = f"<details><summary>How this was measured, and what the recipes are</summary>\n{details}</details>\n"
    header = html.header("Which recipe?", title, "", f"<pre>{html.escape(command)}</pre>\n", details)
    sections = [_html_section(comparison, setting, columns) for setting in settings]
    write_atomically(paths.html, html.document(title, header, sections).encode())


def _columns(comparison: Comparison) -> list[tables.Column]:
    """Return the columns that were measured."""
    images = [tables.PSNR] if comparison.yardstick.images else []
    distances = [tables.FD_REAL, tables.FD_FLOAT] if images and comparison.yardstick.data else []
    return [tables.SQNR, tables.WORST, *images, *distances, tables.SECONDS, tables.SIZE, tables.WORK]


def _draw_setting(comparison: Comparison, bits: Bits, paths: PagePaths) -> Setting | None:
    """Draw the pictures of one setting of bits; return None if nothing was measured at it."""
    table = table_at(comparison, *bits)
    name = f"W{bits[0]}A{bits[1]}"
    if not table:
        return None
    stem = paths.markdown.with_name(f"{paths.markdown.stem}-{name.lower()}")
    images = stem.with_suffix(".png") if comparison.yardstick.images else None
    if images is not None:
        _draw_grid(comparison, table, bits, images)
    visited = timesteps(comparison.model.spec.sampler, comparison.model.schedule.num_train).tolist()
    drawn = curves.Curves(
        title=f"{comparison.model.spec.name} {name}",
        table=table,
        timesteps=visited,
        omitted=(WORST,),
        # The lower plot shows what each recipe adds to plain AdaRound.
        baseline="adaround" if "adaround" in table else next(iter(table)),
    )
    curves.draw(stem.with_suffix(".svg"), drawn)
    return Setting(name=name, table=table, curves=stem.with_suffix(".svg"), images=images)


def _draw_grid(comparison: Comparison, table: Table, bits: Bits, path: Path) -> None:
    """Draw the float network's images and those of every recipe, one row each."""
    rows = [("float", yardstick.float_images(comparison.yardstick)[: runner.SHOWN])]
    for name in table:
        # Of one seed: all rows start from the same noise, so a column shows one image drawn by every recipe.
        cell = Cell(row=name, seed=comparison.seeds[0], wbits=bits[0])
        stored = runner.read_images(comparison, cell, bits[1])
        if stored is not None:
            rows.append((name, stored))
    save_grid(path, rows)


def _markdown_section(comparison: Comparison, setting: Setting, columns: Sequence[tables.Column]) -> list[str]:
    lines = ["", f"## {setting.name}", ""]
    lines += tables.markdown(setting.table, "recipe", columns, tables.float_rows(comparison, columns))
    lines += ["", tables.ranking(setting.table), "", f"![SQNR at every step]({setting.curves.name})"]
    return lines if setting.images is None else [*lines, "", f"![Images from the same noise]({setting.images.name})"]


def _html_section(comparison: Comparison, setting: Setting, columns: Sequence[tables.Column]) -> str:
    svg = setting.curves.read_text(encoding="utf-8")  # inside the page, which then needs no file beside it
    rows = [*tables.rows(setting.table, columns), *tables.float_rows(comparison, columns)]
    parts = [
        html.table(["recipe", *(c.title for c in columns)], [[cell.strip("`") for cell in row] for row in rows]),
        html.text(tables.ranking(setting.table).replace("`", "")),
        # Without the XML declaration before it, which a page may not have in the middle.
        html.figure(svg[svg.index("<svg") :], "SQNR of the predicted noise at every sampling step, mean over seeds."),
    ]
    if setting.images is not None:
        picture = html.picture(setting.images.read_bytes(), "Images of every recipe")
        parts.append(html.figure(picture, f"Images from the same noise, seed {comparison.seeds[0]}."))
    return html.section(setting.name, *parts)
