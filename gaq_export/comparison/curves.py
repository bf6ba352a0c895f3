"""SQNR against the sampling step, one curve for each row of a comparison, as one SVG or PNG file.

In: `Curves`, the scores of one setting of bits. Out: a file; the same curves give the same bytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calib.files import write_atomically
from gaq_export.comparison.results import Table
from gaq_export.comparison.tables import BASELINE
from gaq_export.errors import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a figure shows.

    Attributes:
        title: of the figure, such as the model and the bits.
        table: scores by row and seed.
        timesteps: training timestep of each sampling step.
        omitted: rows so far from the baseline that they would flatten all differences in the lower plot.
        baseline: the row that differences are taken to.
    """

    title: str
    table: Table
    timesteps: Sequence[int]
    omitted: Sequence[str] = ()
    baseline: str = BASELINE


def draw(path: Path, curves: Curves) -> None:
    """Draw SQNR against the sampling step, mean over seeds, and below it the difference to the baseline.

    Args:
        path: .svg or .png to write.
        curves: what to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    table = curves.table
    baseline = curves.baseline
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    if len(table) > 10:  # more than the default has colours
        upper.set_prop_cycle(color=mpl.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for row, seeds in table.items():
        mean = np.mean([scores.steps_db for scores in seeds.values()], axis=0)  # (seeds, S) -> (S,)
        style = "--" if row == baseline else "-"
        (line,) = upper.plot(mean, style, label=row, linewidth=1.2)
        differences = _differences(table, row, baseline)
        if differences and row not in curves.omitted:
            # Differences seed by seed, then their mean: the spread between seeds drops out. (seeds, S) -> (S,)
            lower.plot(np.mean(differences, axis=0), style, color=line.get_color(), linewidth=1.2)
    upper.set(ylabel="SQNR of the predicted noise, dB")
    upper.set_title(f"{visible(curves.title)}, mean over seeds", parse_math=False)  # a model's name may hold a $
    upper.legend(ncols=3, fontsize="small")
    last = len(curves.timesteps) - 1
    marks = [*range(0, last, max(1, (last + 1) // 5)), last]  # about five, and always the last step
    lower.set(xlabel="sampling step (training timestep)", ylabel=f"difference to {baseline}, dB")
    lower.set_xticks(marks, [f"{i}\n({curves.timesteps[i]})" for i in marks])
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    _save(figure, path, visible(curves.title))


def _differences(table: Table, row: str, baseline: str) -> list[npt.NDArray[np.float64]]:
    """Return a row's lead over the baseline at each step, (S,), for each seed that both have."""
    base = table.get(baseline, {})
    return [np.subtract(scores.steps_db, base[seed].steps_db) for seed, scores in table[row].items() if seed in base]


def _save(figure: "Figure", path: Path, salt: str) -> None:
    """Write a figure; a salt for its ids and no date make the same figure the same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        # Text stays text: small, searchable, and the same whatever fonts this machine has.
        figure.savefig(buffer, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    write_atomically(path, buffer.getvalue())
