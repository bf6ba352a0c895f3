"""Measure the cells of a comparison: each calibrates once, in its own process, and writes its numbers as JSON.

Rounding does not depend on activation bits, since weights are calibrated before activations are ranged: one cell serves
all activation widths of its weights. With one process for each cell, peak memory is the cell's alone and a crash costs
one cell; every process has one thread. The same command continues where an earlier one stopped, and measures only what
is missing.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from calib import config as configs
from calib import cost
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.files import read_kept, write_atomically, write_checked
from calib.plan import QuantPlan
from calib.progress import Progress
from calib.records import Count, Finite, read_kept_record, signed
from calib.surgery import apply_surgery
from gaq_export.comparison import yardstick
from gaq_export.comparison.spec import Cell, Comparison, calibration_set, claim, version
from gaq_export.errors import GaqError
from gaq_export.quantize.make_plan import CalibrationCallbacks, make_plan
from gaq_export.run import peak_memory_mib

SHOWN = 8  # images that are stored, for the page
PREPARE = "prepare"  # the job before all cells
Measure = Callable[[Comparison, Callable[[str], None]], list[Cell]]


def execute(
    comparison: Comparison,
    job: str | None,
    report_only: bool,
    write_page: Callable[[], None],
    say: Callable[[str], None],
    measure: Measure | None = None,
) -> None:
    """Do the one job that this process was started for, or measure what is missing and write the page.

    Args:
        comparison: what to measure.
        job: name of the job; None for the command that a user gave.
        report_only: whether to write the page without measuring.
        write_page: writes the page.
        say: called with a line for each finished job.
        measure: measures what is missing and returns the cells that failed; `run`, in processes here, if None.

    Raises:
        SystemExit: a cell failed.
    """
    if job:
        work(comparison, job)
        return
    claim(comparison)
    failed = [] if report_only else (measure or run)(comparison, say)
    write_page()
    if failed:
        raise SystemExit(1)


def run(comparison: Comparison, say: Callable[[str], None]) -> list[Cell]:
    """Measure every missing cell, each in a process that repeats this command with --job; return those that failed."""
    if not _spawn(comparison, PREPARE, say):
        raise GaqError(f"The preparation failed: see {_log(comparison, PREPARE)}.")
    todo = missing(comparison)
    # Threads, since each does nothing but wait for a process.
    with ThreadPoolExecutor(comparison.workers) as pool:
        try:
            succeeded = list(pool.map(lambda cell: _spawn(comparison, cell.name, say), todo))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # else the cells in the queue would still start
            raise
    return [cell for cell, ok in zip(todo, succeeded, strict=True) if not ok]


def work(comparison: Comparison, job: str) -> None:
    """Do one job in this process."""
    torch.set_num_threads(1)
    if job == PREPARE:
        for seed in comparison.seeds:
            _calibration_set(comparison, seed)
        yardstick.prepare(comparison.yardstick)
    else:
        _measure(comparison, next(cell for cell in comparison.cells if cell.name == job))


def missing(comparison: Comparison) -> list[Cell]:
    """Return the cells that have yet to measure an activation width."""
    return [cell for cell in comparison.cells if _missing_widths(comparison, cell)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a cell has measured at one activation width.

    Attributes:
        bytes: of all weights.
        bit_operations: for one image and step.
        error: squared error of the predicted noise at each sampling step.
        psnr_db: of each image, None if none were drawn.
        fd_real: Frechet distance to real images, None without data.
        fd_float: Frechet distance to images of the float model, likewise.
    """

    bytes: NonNegativeFloat
    bit_operations: NonNegativeFloat
    error: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    psnr_db: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    fd_real: Finite | None = None
    fd_float: Finite | None = None


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """What a cell has measured so far.

    Attributes:
        seconds: of the calibration, images already collected.
        peak_mib: largest resident memory of the process until the plan was there, None where the system has no count.
        workers: cells that ran at a time.
        version: of this program.
        config: of the calibration, as JSON.
        omega_spread: see `omega_spread`.
        block_losses: loss of each reconstructed block with its final rounding.
        weights_error: squared error with float activations at each step, None where that was not measured.
        activations: by activation bits, "8".
    """

    seconds: NonNegativeFloat
    peak_mib: NonNegativeFloat | None
    workers: Count
    version: str
    config: dict[str, Any]
    omega_spread: float
    block_losses: dict[str, NonNegativeFloat]
    weights_error: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] | None = None
    activations: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a calibration has cost: processor seconds, and the largest peak in MiB, None where the system has none."""

    seconds: NonNegativeFloat
    peak_mib: NonNegativeFloat | None


def read_cell(comparison: Comparison, cell: Cell) -> CellRecord | None:
    """Return what a cell has measured so far, None if nothing, or nothing that verifies."""
    return read_kept_record(CellRecord, comparison.path(cell, ".json"))


def images_path(comparison: Comparison, cell: Cell, abits: int) -> Path:
    """Return where the first SHOWN images of a cell are stored."""
    return comparison.path(cell, f"-a{abits}.safetensors")


def read_images(comparison: Comparison, cell: Cell, abits: int) -> Tensor | None:
    """Return the images (N, C, H, W) that are stored for the page, None if there are none that verify."""
    return read_kept(images_path(comparison, cell, abits), lambda header, tensors: tensors.get("images"))


def at_width(config: QuantConfig, abits: int) -> QuantConfig:
    """Return a config at another activation width.

    The blocks that a folder holds from one width serve all others, so `make_plan` only observes ranges again. They are
    observed rather than computed from the old scales, because a float32 scale has lost bits of its range.
    """
    return dataclasses.replace(config, activation=dataclasses.replace(config.activation, bits=abits))


def _measure(comparison: Comparison, cell: Cell) -> None:
    """Calibrate once for each activation width that is missing, and write down the results."""
    data = _calibration_set(comparison, cell.seed)
    config = comparison.config(cell)
    blocks = comparison.path(cell, "")
    record = read_cell(comparison, cell)
    for abits in _missing_widths(comparison, cell):
        clock = Clock(blocks / "clock.json")
        callbacks = CalibrationCallbacks(on_progress=clock.on_progress)
        plan = make_plan(comparison.model, data, at_width(config, abits), blocks, callbacks)
        if record is None:  # a later width finds the blocks ready, so its time would say nothing
            record = _calibration_facts(comparison, config, plan, clock.read())
        scores, images = _scores(comparison, plan)
        if images is not None:
            write_checked(images_path(comparison, cell, abits), {"images": images[:SHOWN]})
        record = dataclasses.replace(record, activations={**record.activations, str(abits): scores})
        # After every width, so that a stop costs one.
        write_atomically(comparison.path(cell, ".json"), signed(dataclasses.asdict(record)))


def _calibration_facts(comparison: Comparison, config: QuantConfig, plan: QuantPlan, spent: Spent) -> CellRecord:
    """Return what does not depend on the activation width."""
    weights_error = None
    if comparison.weights_alone:
        weights = fake_quantized(comparison.model.network, plan, activations=False)
        weights_error = tuple(yardstick.noise_errors(comparison.yardstick, weights))
    return CellRecord(
        seconds=spent.seconds,
        peak_mib=spent.peak_mib,
        workers=comparison.workers,
        version=version(),
        config=configs.to_json(config),
        omega_spread=omega_spread(plan),
        block_losses={b.name: b.loss_after for b in plan.blocks if b.loss_after is not None},
        weights_error=weights_error,
    )


def _scores(comparison: Comparison, plan: QuantPlan) -> tuple[Measured, Tensor | None]:
    """Return a plan's size, work and quality, and the images (N, C, H, W) that it draws, None if there are none."""
    shared = comparison.yardstick
    model = comparison.model
    network = apply_surgery(model.network, plan.surgery)
    macs = cost.layer_macs(network, model.shape, model.schedule.num_train, model.condition_inputs)
    with yardstick.quantized(shared, plan) as denoise:
        error = yardstick.noise_errors(shared, denoise, plan.correction)
        images = yardstick.draw_images(shared, denoise, plan.correction) if shared.images else None
    scores = Measured(
        bytes=cost.weight_bytes(network, plan),
        bit_operations=cost.bit_operations(macs, plan),
        error=tuple(error),
        **({} if images is None else yardstick.image_scores(shared, images)),
    )
    return scores, images


class Clock:
    """Processor seconds and peak memory of a calibration, even if it was interrupted and continued.

    A process has one thread, so on an idle machine these are the seconds that a user waits.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.process_time()  # not the clock on the wall, which runs for other workers too
        self._before = read_kept_record(Spent, path) or Spent(seconds=0.0, peak_mib=None)

    def read(self) -> Spent:
        """Return what all processes have spent together."""
        seconds = self._before.seconds + time.process_time() - self._started
        peaks = [peak for peak in (self._before.peak_mib, peak_memory_mib()) if peak is not None]
        return Spent(seconds=seconds, peak_mib=max(peaks, default=None))

    def on_progress(self, progress: Progress) -> None:
        """Write down what a finished block has cost so far."""
        if progress.result is not None and not progress.resumed:
            write_atomically(self._path, signed(dataclasses.asdict(self.read())))


def omega_spread(plan: QuantPlan) -> float:
    """Return the standard deviation of softmax(scores / tau) over the training samples, times their number."""
    # Times N, so that the spread does not shrink with the size of the training set.
    omega = torch.softmax(plan.scores / plan.config.omega.temperature, 0)
    return float(omega.std(correction=0)) * len(omega)


def _calibration_set(comparison: Comparison, seed: int) -> CalibrationSet:
    return calibration_set(comparison.model, comparison.preset, seed, comparison.yardstick.folder)


def _missing_widths(comparison: Comparison, cell: Cell) -> list[int]:
    """Return the activation widths that a cell has yet to measure."""
    record = read_cell(comparison, cell)
    widths = [a for w, a in comparison.bits if w == cell.wbits]
    return [a for a in widths if record is None or str(a) not in record.activations or not _shown(comparison, cell, a)]


def _shown(comparison: Comparison, cell: Cell, abits: int) -> bool:
    """Return whether the images that a cell shows are stored and verify."""
    return comparison.yardstick.images == 0 or read_images(comparison, cell, abits) is not None


def _spawn(comparison: Comparison, job: str, say: Callable[[str], None]) -> bool:
    """Run this command again for one job, with one thread, its output in a log; return whether it succeeded."""
    started = time.perf_counter()
    log = _log(comparison, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        # The command that `compare` or a benchmark was started with, so that a job parses the same options.
        ours = Path(sys.argv[0]).name in ("gaq-export", "__main__.py")
        program = ["-m", "gaq_export"] if ours else [sys.argv[0]]
        command = [sys.executable, *program, *sys.argv[1:], "--job", job]
        # Two threads of one calibration would compete with the other workers, and change sums in the last bit.
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=stream, stderr=stream, env=threads, check=False).returncode
    say(f"{job}: {'done' if code == 0 else f'failed, see {log}'} after {time.perf_counter() - started:.0f} s")
    return code == 0


def _log(comparison: Comparison, job: str) -> Path:
    return comparison.yardstick.folder / "logs" / f"{job}.log"
