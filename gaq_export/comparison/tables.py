"""From cells to a page: statistics over seeds, Markdown tables, and what a reader must know.

Rows share seeds, hence calibration images, validation splits and the images they are evaluated on. So a row is compared
with another one seed by seed: that difference varies far less than either of the two.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed
from itertools import pairwise

from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.results import CellScores, Table
from gaq_export.comparison.spec import Comparison
from gaq_export.comparison.yardstick import ComputedBy
from gaq_export.errors import GaqError, visible
from gaq_export.report.markdown import machine, markdown_table

BASELINE = "uniform"
COMPUTED_BY = {
    ComputedBy.ENGINE: "their OpenVINO engine",
    ComputedBy.PYTORCH: "fake quantization in PyTorch",
}
STARTS = {"float": "the float weights", "gptq": "GPTQ's rounding"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        title: its heading.
        value: what it shows of a cell, None if that was not measured.
        digits: after the point.
        paired: whether it shows the difference to the baseline at the same seed.
        meaning: the explanation for the page; may be empty.
    """

    title: str
    value: Callable[[CellScores], float | None]
    digits: int = 2
    paired: bool = False
    meaning: str = ""


SQNR = Column(
    title="SQNR, dB",
    value=lambda m: m.mean_db,
    meaning=f"of the predicted noise against the float network, on the float network's trajectories of "
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
# Their meaning depends on what was measured with, so `_frechet_line` writes it.
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


def paired(table: Table, row: str, value: Callable[[CellScores], float | None]) -> list[float]:
    """Return the differences of `row` to the baseline, one for each seed that both have."""
    base = table.get(BASELINE, {})
    # Seeds that one of both lacks would add the spread between seeds, which pairing is there to remove.
    pairs = [(value(m), value(base[seed])) for seed, m in table[row].items() if seed in base]
    return [a - b for a, b in pairs if a is not None and b is not None]


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Write mean and standard deviation; the mean alone where there is one value, a dash where there is none.

    >>> mean_sd([1.0, 2.0, 3.0], 1), mean_sd([1.0], 1), mean_sd([], 1)
    ('2.0 ± 1.0', '1.0', '-')
    """
    if not values:
        return "-"
    # One value has no standard deviation.
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
    """Return the table that `markdown` shows, cell by cell."""
    lines = []
    for row, seeds in table.items():
        line = [words.get(row, f"`{row}`")]
        for c in columns:
            # One value for each seed.
            values = paired(table, row, c.value) if c.paired else [c.value(m) for m in seeds.values()]
            known = [v for v in values if v is not None]
            # The baseline's difference to itself would be a row of zeros.
            line.append("-" if c.paired and row == BASELINE else mean_sd(known, c.digits))
        lines.append(line)
    return lines


def float_rows(comparison: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """Return the float network's rows: its images from the same noise as the cells', and from other noise."""
    if not comparison.yardstick.images:
        return []
    frechet = yardstick.facts(comparison.yardstick).frechet
    lines = []
    for name in ("same", "other"):
        cells = {column.title: "∞" for column in (SQNR, WORST, POOLED, WEIGHTS)}  # its noise is exact
        # Images from other noise have no partner to compare with.
        cells |= {PSNR.title: "∞" if name == "same" else "-"}
        if frechet is not None:
            cells |= {FD_REAL.title: f"{frechet.drawn[name].fd_real:.2f}"}
            cells |= {FD_FLOAT.title: f"{frechet.drawn[name].fd_float:.2f}"}
        lines.append([f"float, {name} noise", *(cells.get(column.title, "-") for column in columns)])
    return lines


def ranking(table: Table) -> str:
    """Return a sentence with the rows by mean SQNR over the seeds that all have, and which are too close to call."""
    # Seeds that only some rows have would compare different calibration images.
    shared = sorted(set.intersection(*(set(seeds) for seeds in table.values())))
    if len(table) < 2 or not shared:
        return "Fewer than two rows have a seed in common, so there is no order."
    means = {row: statistics.fmean(seeds[s].mean_db for s in shared) for row, seeds in table.items()}
    order = sorted(means, key=lambda row: -means[row])
    text = f"`{order[0]}`"
    for before, after in pairwise(order):
        leads = [table[before][s].mean_db - table[after][s].mean_db for s in shared]
        # The lead of neighbours, seed by seed: the spread between seeds drops out of it.
        sure = len(leads) > 1 and statistics.fmean(leads) > 2 * statistics.stdev(leads) / math.sqrt(len(leads))
        text += f" {'>' if sure else '≈'} `{after}`"
    return (
        f"By mean SQNR, seeds {', '.join(map(str, shared))}: {text}; ≈ where the lead, seed by seed, is not more than "
        "twice its standard error, or there is one seed."
    )


def how_measured(
    comparison: Comparison, columns: Sequence[Column], written: Callable[[str], str] = visible
) -> list[str]:
    """Return what a reader needs to repeat and to judge the numbers, as items of a Markdown list.

    Args:
        comparison: what was measured.
        columns: which of it is shown.
        written: how the page writes a foreign text, the model's name; `markdown.plain` for Markdown.

    Raises:
        GaqError: nothing was measured yet.
    """
    shared = comparison.yardstick
    preset = comparison.preset
    spec = comparison.model.spec.sampler
    records = [r for r in (runner.read_cell(comparison, cell) for cell in comparison.cells) if r]
    if not records:
        raise GaqError(f"{shared.folder} holds no results yet: run without --report-only first.")
    config = preset.config
    reconstruction = config.reconstruction
    lines = [
        f"Machine: {machine()}; cells at a time: {_listed(r.workers for r in records)}, one thread each. "
        f"torch {installed('torch')}, OpenVINO {installed('openvino')}, "
        f"gaq-export {_listed(r.version for r in records)}.",
        f"Model and sampler: {written(comparison.model.spec.name)}, {spec.steps} {spec.name.upper()} steps, "
        f"{spec.spacing} spacing.",
        f"Schedule: {preset.images} calibration images a seed, each giving a sample at every sampling step; "
        f"{min(config.weight_steps, spec.steps)} of the {spec.steps} steps calibrate weights, all of them activations; "
        f"{reconstruction.iterations} iterations a block in batches of {reconstruction.batch} at learning rate "
        f"{reconstruction.learning_rate:g}, starting from {STARTS[reconstruction.start]}; {config.omega.meta_steps} "
        "meta steps a block for learned sample weights.",
        f"Seeds: {_listed(comparison.seeds)}. Each is calibration images, split and mini-batches together; ± is the "
        "standard deviation over seeds.",
        f"Quantized networks are computed by {COMPUTED_BY[shared.computed_by]}, the float network by PyTorch.",
        *(f"{column.title}: {column.meaning}." for column in columns if column.meaning),
    ]
    if shared.images:
        lines.append(f"Images: {shared.images} of each network, drawn by the same.")
        lines.append(
            _frechet_line(comparison) if shared.data else "No Frechet distances: no real images were given (--data)."
        )
    return [f"- {line}" for line in lines]


def still_missing(comparison: Comparison) -> list[str]:
    """Return the lines that name the cells not measured yet; empty if all are."""
    names = [cell.name for cell in runner.missing(comparison)]
    return ["", f"Not measured: {', '.join(names)}."] if names else []


def _listed(values: Iterable[object]) -> str:
    # Cells of one folder may be from several versions or numbers of workers; each is named once.
    return ", ".join(sorted({str(value) for value in values}))


def _frechet_line(comparison: Comparison) -> str:
    n = comparison.yardstick.images
    facts = yardstick.facts(comparison.yardstick).frechet
    assert facts is not None  # there is data
    return (
        f"FD: Frechet distance (squared) in the 64 features of a {facts.classifier} that classifies "
        f"{100 * facts.accuracy:.2f} % of the test images correctly; not to be compared with an FID. Between {n} "
        f"images and {facts.real_images} real test images, and between {n} images and {n} of the float network from "
        f"other noise. The float rows are the floor; {n} further real test images are "
        f"{facts.real.fd_real:.2f} from the real and {facts.real.fd_float:.2f} from the float ones."
    )
