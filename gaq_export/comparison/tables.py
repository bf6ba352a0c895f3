"""From cells to a page: statistics over seeds, Markdown tables, what a reader must know, and curves.

Rows share seeds, hence calibration images, validation splits and the images they are judged on: what a row is worth is
the difference to another row seed by seed, which is far steadier than either of the two.
"""

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path

import numpy as np

from calib.files import write_atomically
from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.results import Measured, Table
from gaq_export.comparison.spec import Comparison
from gaq_export.errors import GaqError
from gaq_export.report.markdown import machine, markdown_table

BASELINE = "uniform"
STARTS = {"float": "the float weights", "gptq": "GPTQ's rounding"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        title: its heading.
        value: what it shows of a cell.
        digits: after the point.
        paired: whether as the difference to the baseline of the same seed.
        meaning: explained below the command, if it is not empty.
    """

    title: str
    value: Callable[[Measured], float | None]
    digits: int = 2
    paired: bool = False
    meaning: str = ""


SQNR = Column(
    title="SQNR, dB",
    value=lambda m: m.mean_db,
    meaning=f"of the predicted noise against the float network, on the float network's own trajectories of "
    f"{yardstick.HELD_OUT} images that calibration never sees; mean over all sampling steps",
)
SQNR_LEAD = replace(
    SQNR, title=f"to `{BASELINE}`, dB", digits=3, paired=True, meaning="difference in SQNR, seed by seed"
)
POOLED = Column(
    title="pooled, dB",
    value=lambda m: m.pooled_db,
    meaning="SQNR with signal and error summed over the steps first",
)
WEIGHTS = Column(
    title="weights only, dB", value=lambda m: m.weights_db, meaning="SQNR with float activations, mean over steps"
)
WEIGHTS_LEAD = replace(
    WEIGHTS,
    title=f"weights only, to `{BASELINE}`, dB",
    digits=3,
    paired=True,
    meaning="the same as a difference, seed by seed",
)
PSNR = Column(
    title="PSNR, dB",
    value=lambda m: m.psnr_db,
    meaning="of finished images against the float network's from the same noise, median over images",
)
FD_REAL = Column(title="FD to real", value=lambda m: m.fd_real)
FD_FLOAT = Column(title="FD to float", value=lambda m: m.fd_float)
SECONDS = Column(
    title="calibration, s",
    value=lambda m: m.seconds,
    digits=0,
    meaning="processor time of one thread, without collecting the calibration images",
)
PEAK = Column(
    title="peak, MiB", value=lambda m: m.peak_mib, digits=0, meaning="resident memory of the calibrating process"
)
WORST = Column(title="worst step, dB", value=lambda m: min(m.steps_db), meaning="SQNR at the step with the lowest")
SIZE = Column(title="weights, MB", value=lambda m: m.megabytes, meaning="codes packed, scales, float parameters")
WORK = Column(
    title="Gbit-ops",
    value=lambda m: m.giga_bit_operations,
    digits=1,
    meaning="for one image and step: multiplications times weight bits times activation bits, 32 in a float layer",
)
SPREAD = Column(
    title="omega spread",
    value=lambda m: m.spread,
    digits=3,
    meaning="standard deviation of the sample weights' softmax over the training set, times their number; 0 is uniform",
)


def paired(table: Table, row: str, value: Callable[[Measured], float | None]) -> list[float]:
    """Return the differences of `row` to the baseline, one for each seed that both have."""
    base = table.get(BASELINE, {})
    pairs = [(value(m), value(base[seed])) for seed, m in table[row].items() if seed in base]
    return [a - b for a, b in pairs if a is not None and b is not None]


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Write mean and standard deviation; the mean alone where there is one value, a dash where there is none.

    >>> mean_sd([1.0, 2.0, 3.0], 1), mean_sd([1.0], 1), mean_sd([], 1)
    ('2.0 ± 1.0', '1.0', '-')
    """
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def markdown(
    table: Table,
    first: str,
    columns: Sequence[Column],
    more: Sequence[Sequence[str]] = (),
    words: Mapping[str, str] = {},
) -> list[str]:
    """Return the lines of a Markdown table: a row each, its seeds as mean ± standard deviation, then rows of `more`.

    Args:
        table: what was measured.
        first: title of the first column, which names the rows.
        columns: the others.
        more: further rows, already in words.
        words: what to call a row, where that is not its name.
    """
    return markdown_table([first, *(c.title for c in columns)], [*rows(table, columns, words), *more])


def rows(table: Table, columns: Sequence[Column], words: Mapping[str, str] = {}) -> list[list[str]]:
    """Return what `markdown` shows of the table, cell by cell."""
    found = []
    for row, seeds in table.items():
        shown = [words.get(row, f"`{row}`")]
        for c in columns:
            values = paired(table, row, c.value) if c.paired else [c.value(m) for m in seeds.values()]
            known = [v for v in values if v is not None]
            shown.append("-" if c.paired and row == BASELINE else mean_sd(known, c.digits))
        found.append(shown)
    return found


def float_rows(bench: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """Return the float network's rows: infinitely close to itself, and as far from real images as it is."""
    if not bench.yardstick.images:
        return []
    distances = yardstick.facts(bench.yardstick).get("frechet", {}).get("float", {})
    found = []
    for name in ("same", "other"):
        shown = {column.title: "∞" for column in (SQNR, WORST, POOLED, WEIGHTS)}
        shown |= {PSNR.title: "∞" if name == "same" else "-"}
        if distances:
            shown |= {FD_REAL.title: f"{distances[name]['fd_real']:.2f}"}
            shown |= {FD_FLOAT.title: f"{distances[name]['fd_float']:.2f}"}
        found.append([f"float, {name} noise", *(shown.get(column.title, "-") for column in columns)])
    return found


def ranking(table: Table) -> str:
    """Say in which order the rows stand by mean SQNR over the seeds that all have, and which are too close to call."""
    shared = sorted(set.intersection(*(set(seeds) for seeds in table.values())))
    if len(table) < 2 or not shared:
        return "Fewer than two rows have a seed in common, so there is no order."
    means = {row: statistics.fmean(seeds[s].mean_db for s in shared) for row, seeds in table.items()}
    order = sorted(means, key=lambda row: -means[row])
    text = f"`{order[0]}`"
    for before, after in pairwise(order):
        leads = [table[before][s].mean_db - table[after][s].mean_db for s in shared]
        sure = len(leads) > 1 and statistics.fmean(leads) > 2 * statistics.stdev(leads) / math.sqrt(len(leads))
        text += f" {'>' if sure else '≈'} `{after}`"
    return (
        f"By mean SQNR, seeds {', '.join(map(str, shared))}: {text}; ≈ where the lead, seed by seed, is not more than "
        "twice its standard error, or there is one seed."
    )


def circumstances(bench: Comparison, columns: Sequence[Column]) -> list[str]:
    """Return what a reader needs to repeat and to judge the numbers, as list items.

    Raises:
        GaqError: nothing was measured yet.
    """
    y, schedule, spec = bench.yardstick, bench.schedule, bench.model.spec.sampler
    found = [r for r in (runner.result(bench, cell) for cell in bench.cells) if r]
    if not found:
        raise GaqError(f"{y.folder} holds no results yet: run without --report-only first.")
    c, by = schedule.config, "their OpenVINO engine" if y.draw == "engine" else "fake quantization in PyTorch"
    lines = [
        f"Machine: {machine()}; cells at a time: {_listed(r['workers'] for r in found)}, one thread each. "
        f"torch {installed('torch')}, OpenVINO {installed('openvino')}, "
        f"gaq-export {_listed(r['version'] for r in found)}.",
        f"Model and sampler: {bench.model.spec.name}, {spec.steps} {spec.name.upper()} steps, {spec.spacing} spacing.",
        f"Schedule: {schedule.images} calibration images a seed, each giving a sample at every sampling step; "
        f"{min(c.weight_steps, spec.steps)} of the {spec.steps} steps calibrate weights, all of them activations; "
        f"{c.reconstruction.iterations} iterations a block in batches of {c.reconstruction.batch} at learning rate "
        f"{c.reconstruction.learning_rate:g}, starting from {STARTS[c.reconstruction.start]}; {c.omega.meta_steps} "
        "meta steps a block for learned sample weights.",
        f"Seeds: {_listed(bench.seeds)}. Each is calibration images, split and mini-batches together; ± is the "
        "standard deviation over seeds.",
        f"Quantized networks are computed by {by}, the float network by PyTorch.",
        *(f"{column.title}: {column.meaning}." for column in columns if column.meaning),
    ]
    if y.images:
        lines.append(f"Images: {y.images} of each network, drawn by the same.")
        lines.append(_frechet_line(bench) if y.data else "No Frechet distances: no real images were given (--data).")
    return [f"- {line}" for line in lines]


def still_missing(bench: Comparison) -> list[str]:
    """Return the lines that name the cells not measured yet, none if there are none."""
    names = [cell.name for cell in runner.missing(bench)]
    return ["", f"Not measured: {', '.join(names)}."] if names else []


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _frechet_line(bench: Comparison) -> str:
    n, facts = bench.yardstick.images, yardstick.facts(bench.yardstick)["frechet"]
    return (
        f"FD: Frechet distance (squared) in the 64 features of a {facts['classifier']} that classifies "
        f"{100 * facts['accuracy']:.2f} % of the test images rightly; not to be compared with an FID. Between {n} "
        f"images and {facts['real_images']} real test images, and between {n} images and {n} of the float network from "
        f"other noise. The float rows are the floor; {n} further real test images are "
        f"{facts['real']['fd_real']:.2f} from the real and {facts['real']['fd_float']:.2f} from the float ones."
    )


def curves(
    path: Path,
    setting: str,
    table: Table,
    timesteps: Sequence[int],
    far: Sequence[str] = (),
    baseline: str = BASELINE,
) -> None:
    """Draw SQNR against the sampling step, mean over seeds, and below it the difference to the baseline.

    Args:
        path: .svg or .png to write.
        setting: bits, for the title.
        table: what was measured.
        timesteps: training timestep of each sampling step.
        far: rows so far from the baseline that the others would not be told apart below.
        baseline: a row.
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
        if seeds and row not in far:
            pairs = [np.subtract(table[row][s].steps_db, table[baseline][s].steps_db) for s in seeds]
            lower.plot(np.mean(pairs, axis=0), style, color=line.get_color(), linewidth=1.2)
    upper.set(ylabel="SQNR of the predicted noise, dB", title=f"{setting}, mean over seeds")
    upper.legend(ncols=3, fontsize="small")
    marks = [*range(0, len(timesteps) - 1, max(1, len(timesteps) // 5)), len(timesteps) - 1]
    lower.set(xlabel="sampling step (training timestep)", ylabel=f"difference to {baseline}, dB")
    lower.set_xticks(marks, [f"{i}\n({timesteps[i]})" for i in marks])
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": setting, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    write_atomically(path, buffer.getvalue())
