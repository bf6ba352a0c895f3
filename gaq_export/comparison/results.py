"""What the cells of a comparison measured, as numbers by row and seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calib.sqnr import ratio_db
from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.spec import Comparison


@dataclass(frozen=True, kw_only=True)
class Measured:
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
        megabytes: of all weights.
        giga_bit_operations: for one image and step.
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


Table = Mapping[str, Mapping[int, Measured]]  # row -> seed -> what was measured


def table_at(bench: Comparison, wbits: int, abits: int) -> Table:
    """Read what there is at one setting of bits; rows without any seed are left out."""
    signal = yardstick.facts(bench.yardstick)["signal"]
    table: dict[str, dict[int, Measured]] = {}
    for cell in bench.cells:
        found = runner.result(bench, cell) if cell.wbits == wbits else None
        if found and str(abits) in found["activations"]:
            table.setdefault(cell.row, {})[cell.seed] = _measured(signal, found, found["activations"][str(abits)])
    return table


def _measured(signal: Sequence[float], found: Mapping[str, Any], at: Mapping[str, Any]) -> Measured:
    weights = found.get("weights_error", [math.nan])
    return Measured(
        steps_db=tuple(map(ratio_db, signal, at["error"])),
        pooled_db=ratio_db(sum(signal), sum(at["error"])),
        error=sum(at["error"]),
        weights_db=statistics.fmean(map(ratio_db, signal, weights)),
        weights_error=sum(weights),
        psnr_db=statistics.median(at["psnr_db"]) if "psnr_db" in at else None,
        fd_real=at.get("fd_real"),
        fd_float=at.get("fd_float"),
        seconds=found["seconds"],
        peak_mib=found["peak_mib"],
        spread=found["omega_spread"],
        blocks=found["block_losses"],
        megabytes=at["bytes"] / 1e6 if "bytes" in at else None,
        giga_bit_operations=at["bit_operations"] / 1e9 if "bit_operations" in at else None,
    )
