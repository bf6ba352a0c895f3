"""SQNR against the sampling step, one curve for each row of a comparison, as one SVG or PNG file."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calib.files import write_atomically
from gaq_export.comparison.results import Table
from gaq_export.comparison.tables import BASELINE


def draw(
    path: Path,
    title: str,
    table: Table,
    timesteps: Sequence[int],
    *,
    omitted: Sequence[str] = (),
    baseline: str = BASELINE,
) -> None:
    """Draw SQNR against the sampling step, mean over seeds, and below it the difference to the baseline.

    Args:
        path: .svg or .png to write.
        title: of the figure, such as the model and the bits.
        table: scores by row and seed.
        timesteps: training timestep of each sampling step.
        omitted: rows so far from the baseline that they would flatten all differences in the lower plot.
        baseline: the row that differences are taken to.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    means = {row: np.mean([m.steps_db for m in seeds.values()], axis=0) for row, seeds in table.items()}
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    if len(means) > 10:  # more than the default has colours
        upper.set_prop_cycle(color=mpl.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for row, values in means.items():
        style = "--" if row == baseline else "-"
        (line,) = upper.plot(values, style, label=row, linewidth=1.2)
        seeds = [seed for seed in table[row] if seed in table.get(baseline, {})]
        if seeds and row not in omitted:
            pairs = [np.subtract(table[row][s].steps_db, table[baseline][s].steps_db) for s in seeds]
            lower.plot(np.mean(pairs, axis=0), style, color=line.get_color(), linewidth=1.2)
    upper.set(ylabel="SQNR of the predicted noise, dB", title=f"{title}, mean over seeds")
    upper.legend(ncols=3, fontsize="small")
    marks = [*range(0, len(timesteps) - 1, max(1, len(timesteps) // 5)), len(timesteps) - 1]
    lower.set(xlabel="sampling step (training timestep)", ylabel=f"difference to {baseline}, dB")
    lower.set_xticks(marks, [f"{i}\n({timesteps[i]})" for i in marks])
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    write_atomically(path, buffer.getvalue())
