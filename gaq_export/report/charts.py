"""The charts of the HTML pages: numbers in, one SVG element out, to be put into a page beside others.

The same numbers give the same bytes: ids are salted with the chart's name (which also keeps two charts on one page from
sharing any), and no date is written. Matplotlib's defaults are set while a chart is drawn and put back afterwards, so a
user's matplotlibrc and a caller's settings change no chart, and no chart changes them.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.diagnose import Agreement, Alignment, bin_means
from calib.reconstruct import BlockResult
from gaq_export.errors import visible
from gaq_export.quantize.noise_sqnr import NoiseSqnr
from gaq_export.report import html
from gaq_export.report.inspection import LayerRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 50
NUMBERED = 10  # a heat map of at most so many steps has its numbers in it
WIDTH = 7.2  # inches; the page scales it to its column
ROW = 0.17  # inches of a named row
LONGEST = 64  # characters of a name beside a row
# Okabe, Ito 2008: also for colour-blind readers
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREY = "#8a8f98"
INK = "#22262b"  # the page's
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # of one width, so a page without the first is fine
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e3e6ea",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",  # text stays text, which a reader can search and copy
}


def cosines(agreement: Agreement) -> str:
    """Draw the two heat maps of per-step gradients, before and after, on one scale centred at 0."""
    return _svg(
        "cosines", f"Cosine similarity of per-step gradients, {agreement.block}", 3.5, partial(_cosines, agreement)
    )


def alignment(alignment: Alignment) -> str:
    """Draw omega against alignment, one point a bin of samples."""
    return _svg("alignment", f"Sample weight against alignment, {alignment.block}", 3.0, partial(_alignment, alignment))


def losses(blocks: Sequence[BlockResult]) -> str:
    """Draw each block's loss before and after; every block must have both."""
    height = 0.75 + ROW * len(blocks)
    return _svg("losses", "Block loss before and after calibration", height, partial(_losses, blocks))


def plan_sqnr(noise: NoiseSqnr) -> str:
    """Draw SQNR against the sampling step: the median image, and the span of all of them."""
    return _svg("plan-sqnr", "SQNR of the noise prediction at each sampling step", 3.1, partial(_plan_sqnr, noise))


def engine_sqnr(t: Tensor, series: Mapping[str, Sequence[float]]) -> str:
    """Draw SQNR against the sampling step, a line for each of two series; `t` (S,) is each step's timestep."""
    label = "SQNR of the engine's noise prediction at each sampling step"
    return _svg("engine-sqnr", label, 3.1, partial(_engine_sqnr, t, series))


def sensitivity(errors: Mapping[str, float]) -> str:
    """Draw the error of each layer when it alone is quantized."""
    height = 0.75 + ROW * len(errors)
    return _svg("sensitivity", "Error of the predicted noise, layer by layer", height, partial(_sensitivity, errors))


def ranges(layers: Sequence[LayerRange]) -> str:
    """Draw the share of each layer's weight range that its grid covers, and the largest input on its grid."""
    height = 0.75 + ROW * len(layers)
    return _svg("ranges", "Weight and activation ranges of each layer", height, partial(_ranges, layers))


def _svg(name: str, label: str, height: float, paint: Callable[["Figure"], None]) -> str:
    """Paint a chart and return it as an SVG element that refers to nothing outside itself.

    Args:
        name: of the chart; begins all ids in it.
        label: for readers who cannot see it.
        height: inches.
        paint: draws into an empty figure.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = _STYLE | {"svg.hashsalt": name}
    with mpl.rc_context():  # puts back at its end what rcdefaults overwrites
        mpl.rcdefaults()
        mpl.rcParams.update(style)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # An element inside a page may have no XML declaration before it. The metadata hold matplotlib's version.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Without a size it fills its column, at the ratio of its viewBox.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Definitions and all that refers to them: href="#x" and url(#x).
    text = re.sub(r'\bid="|(?<=href=")#|(?<=url\()#', lambda match: f"{match[0]}{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1).strip()


def _cosines(agreement: Agreement, figure: "Figure") -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    sides = (left, "nearest rounding", agreement.before), (right, "after calibration", agreement.after)
    for axes, title, cosines in sides:
        # matrix (S, S); both maps on one scale with white at 0, so that they can be compared by eye.
        image = axes.imshow(cosines.matrix.numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="none")
        axes.set_title(title)
        axes.set_xlabel("sampling step")
        for spine in axes.spines.values():
            spine.set_visible(False)
        places = _spread(len(agreement.steps), NUMBERED)
        axes.set_xticks(places, [str(agreement.steps[i]) for i in places])
        axes.set_yticks(places, [str(agreement.steps[i]) for i in places])
        if len(agreement.steps) <= NUMBERED:
            _number(axes, cosines.matrix)
    left.set_ylabel("sampling step")
    right.tick_params(left=False)
    figure.colorbar(image, ax=(left, right), shrink=0.85, pad=0.02, label="cosine similarity").outline.set_visible(
        False
    )


def _number(axes: "Axes", matrix: Tensor) -> None:
    """Write each cell's value into it, white where the cell is dark."""
    size = min(8.0, 56 / len(matrix))
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            ink = "white" if abs(value) > 0.7 else INK
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=size, color=ink)


def _alignment(alignment: Alignment, figure: "Figure") -> None:
    axes = figure.subplots()
    omega = alignment.omega
    weight, inner = bin_means(omega, [omega * len(omega), alignment.inner], BINS)  # omega * N is 1 where uniform
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(1, color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.scatter(weight.numpy(), inner.numpy(), s=18, color=BLUE, linewidths=0)
    axes.set_xlabel("mean sample weight of the bin, times N (1 is uniform)")
    axes.set_ylabel("mean inner product with\nthe validation gradient")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.ticklabel_format(axis="x", useOffset=False)


def _losses(blocks: Sequence[BlockResult], figure: "Figure") -> None:
    axes = figure.subplots()
    rows = range(len(blocks))
    before = [b.loss_before or math.nan for b in blocks]
    after = [b.loss_after or math.nan for b in blocks]
    nearest = [i for i in rows if blocks[i].rounding == "nearest"]  # learning did not beat it
    axes.hlines(rows, after, before, color=GREY, linewidth=1)
    axes.scatter(before, rows, s=20, facecolors="white", edgecolors=INK, linewidths=0.9, label="nearest", zorder=3)
    learned = [i for i in rows if i not in nearest]
    axes.scatter([after[i] for i in learned], learned, s=22, color=BLUE, linewidths=0, label="learned", zorder=3)
    if nearest:
        crosses = [before[i] for i in nearest]
        axes.scatter(crosses, nearest, s=26, color=ORANGE, marker="x", linewidths=1.2, label="nearest kept", zorder=4)
    # NaN stands for a loss of 0, which a logarithm cannot show.
    _log_axis(axes, [*before, *after])
    axes.set_xlabel("block loss")
    _name_rows(axes, [b.name for b in blocks])
    figure.legend(loc="outside upper right", ncols=3)


def _plan_sqnr(noise: NoiseSqnr, figure: "Figure") -> None:
    axes = figure.subplots()
    steps = range(len(noise.t))
    for values, color, dashes, label in (
        (noise.weights, BLUE, "-", "weights rounded"),
        (noise.both, ORANGE, (0, (5, 2)), "weights and activations rounded"),
    ):
        values = values.double()  # (S, N)
        axes.fill_between(steps, values.amin(1).numpy(), values.amax(1).numpy(), color=color, alpha=0.15, linewidth=0)
        middle = torch.quantile(values, 0.5, dim=1).numpy()
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, middle, color=color, linestyle=dashes, linewidth=1.4, marker=marker, markersize=3, label=label)
    _name_steps(axes, noise.t)


def _engine_sqnr(t: Tensor, series: Mapping[str, Sequence[float]], figure: "Figure") -> None:
    axes = figure.subplots()
    # Dashed as well as coloured, for readers and printers without colours.
    for (label, values), color, dashes in zip(series.items(), (BLUE, ORANGE), ("-", (0, (5, 2))), strict=True):
        marker = "o" if len(t) <= 30 else None
        axes.plot(values, color=color, linestyle=dashes, linewidth=1.4, marker=marker, markersize=3, label=label)
    _name_steps(axes, t)


def _name_steps(axes: "Axes", t: Tensor) -> None:
    """Name both axes of decibels at each step, timesteps on top, and the lines."""
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("sampling step, noisiest first")
    axes.set_ylabel("SQNR, dB")
    places = _spread(len(t), 11)
    axes.set_xticks(places)
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, [str(int(t[i])) for i in places])
    top.set_xlabel("training timestep t")
    axes.legend(loc="best")


def _sensitivity(errors: Mapping[str, float], figure: "Figure") -> None:
    axes = figure.subplots()
    axes.scatter(list(errors.values()), range(len(errors)), s=18, color=BLUE, linewidths=0)
    _log_axis(axes, list(errors.values()))
    axes.set_xlabel("error of the predicted noise with this layer alone quantized, share of its power")
    _name_rows(axes, list(errors))


def _ranges(layers: Sequence[LayerRange], figure: "Figure") -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(layers))
    low, middle, high = zip(*(layer.covered for layer in layers), strict=True)
    left.axvline(1, color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
    left.hlines(rows, low, high, color=BLUE, alpha=0.45, linewidth=2)
    left.scatter(middle, rows, s=16, color=BLUE, linewidths=0, zorder=3)
    left.set_xlabel("share of max|w| that the grid covers")
    left.set_xlim(0, max(1.05, *high))
    reach = [layer.input_reach for layer in layers]
    right.scatter(reach, rows, s=18, color=ORANGE, marker="D", linewidths=0)
    _log_axis(right, reach)
    right.set_xlabel("largest input that the grid reaches")
    for axes in (left, right):
        _name_rows(axes, [layer.name for layer in layers])
    right.tick_params(labelleft=False)


def _log_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Make x logarithmic with plain numbers: 1, 2, 5, 10 where the values span a few decades at most."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [math.log10(v) for v in values if v > 0]
    narrow = max(known, default=0) - min(known, default=0) < 2.5
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Put the first name on top, one a row, with thin lines to follow."""
    # Of a long name both ends are shown, or no room is left for the chart; a dollar sign would begin a formula.
    lines = [visible(name) for name in names]
    lines = [line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}...{line[-LONGEST // 2 :]}" for line in lines]
    names = [line.replace("$", r"\$") for line in lines]
    axes.set_yticks(range(len(names)), names, fontsize=6.5, fontfamily=["DejaVu Sans Mono", "monospace"])
    axes.set_ylim(len(names) - 0.4, -0.6)  # upside down, so that network order reads from the top
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="both", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` places out of `count`, evenly spaced from the first."""
    return list(range(0, count, max(1, -(-count // most))))
