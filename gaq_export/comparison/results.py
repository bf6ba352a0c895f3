"""The scores of a comparison's cells, by row and seed, as they are read from the files of the cells."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.sqnr import ratio_db
from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.runner import CellRecord, Measured
from gaq_export.comparison.spec import Comparison


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """One cell at one activation width.

    Attributes:
        steps_db: SQNR of the predicted noise at each sampling step.
        pooled_db: the same with signal and error summed over all steps.
        error: squared error, summed over all steps and held-out images.
        weights_db: mean over steps of the SQNR with float activations, NaN where that was not measured.
        weights_error: squared error with float activations, likewise.
        psnr_db: median over images, None if none were drawn.
        fd_real: Frechet distance to real images, None without data.
        fd_float: Frechet distance to images of the float model.
        seconds: of the calibration, images already collected.
        peak_mib: largest resident memory of the process until the plan was there, None where the system has no count.
        spread: standard deviation of the sample weights over the training set, times their number.
        blocks: loss of each reconstructed block with its final rounding, over training samples.
        megabytes: of all weights; None where not counted.
        giga_bit_operations: for one image and step; None likewise.
    """

    steps_db: tuple[float, ...]
    pooled_db: float
    error: float
    weights_db: float
    weights_error: float
    psnr_db: float | None
    fd_real: float | None
    fd_float: float | None
    seconds: float
    peak_mib: float | None
    spread: float
    blocks: Mapping[str, float]
    megabytes: float | None = None
    giga_bit_operations: float | None = None

    @property
    def mean_db(self) -> float:
        """Mean over steps of the SQNR."""
        return statistics.fmean(self.steps_db)


Table = Mapping[str, Mapping[int, CellScores]]  # by row, then by seed


def table_at(comparison: Comparison, wbits: int, abits: int) -> Table:
    """Read what was measured so far at one setting of bits; a row without any seed is left out."""
    signal = yardstick.facts(comparison.yardstick).signal
    table: dict[str, dict[int, CellScores]] = {}
    for cell in comparison.cells:
        record = runner.read_cell(comparison, cell) if cell.wbits == wbits else None
        # JSON's keys are strings.
        if record and str(abits) in record.activations:
            table.setdefault(cell.row, {})[cell.seed] = _scores(signal, record, record.activations[str(abits)])
    return table


def _scores(signal: Sequence[float], record: CellRecord, at: Measured) -> CellScores:
    weights = record.weights_error or (math.nan,)  # one NaN: `map` below stops at it, and its mean is NaN
    return CellScores(
        # Mean of decibels and decibels of sums differ: a few bad steps hide in the first, the quiet ones in the second.
        steps_db=tuple(map(ratio_db, signal, at.error)),
        pooled_db=ratio_db(sum(signal), sum(at.error)),
        error=sum(at.error),
        weights_db=statistics.fmean(map(ratio_db, signal, weights)),
        weights_error=sum(weights),
        psnr_db=None if at.psnr_db is None else statistics.median(at.psnr_db),
        fd_real=at.fd_real,
        fd_float=at.fd_float,
        seconds=record.seconds,
        peak_mib=record.peak_mib,
        spread=record.omega_spread,
        blocks=record.block_losses,
        megabytes=at.bytes / 1e6,
        giga_bit_operations=at.bit_operations / 1e9,
    )
