"""Measuring the cells of a comparison: one calibration each, in a process of its own, its numbers kept as JSON.

Rounding does not depend on activation bits, since weights are calibrated before activations are ranged: one cell serves
all activation widths of its weights. A process a cell makes its peak memory its own and lets a crash cost one cell;
every process has one thread. The same command continues where an earlier one stopped and measures only what is missing.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from calib import config as configs
from calib import cost
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.files import write_atomically
from calib.plan import QuantPlan
from calib.progress import Progress
from calib.surgery import apply_surgery
from gaq_export.comparison import yardstick
from gaq_export.comparison.spec import Cell, Comparison, claim, collected, version
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.quantize import learn
from gaq_export.run import peak_memory_mib

SHOWN = 8  # images that are kept to be looked at
PREPARE = "prepare"  # the job before all cells


def execute(
    bench: Comparison, job: str | None, report_only: bool, write_page: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Do the one job that a process was started for, or measure what is missing and write the page.

    `say` is told of every finished cell.
    """
    if job:
        work(bench, job)
        return
    claim(bench)
    failed = [] if report_only else run(bench, say)
    write_page()
    if failed:
        raise SystemExit(1)


def run(bench: Comparison, say: Callable[[str], None]) -> list[Cell]:
    """Measure every cell that is missing, each in a process that repeats this command with --job; return the failed."""
    if not _spawn(bench, PREPARE, say):
        raise GaqError(f"The preparation failed: see {_log(bench, PREPARE)}.")
    todo = missing(bench)
    with ThreadPoolExecutor(bench.workers) as pool:
        try:
            succeeded = list(pool.map(lambda cell: _spawn(bench, cell.name, say), todo))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return [cell for cell, ok in zip(todo, succeeded, strict=True) if not ok]


def work(bench: Comparison, job: str) -> None:
    """Do one job in this process."""
    torch.set_num_threads(1)
    if job == PREPARE:
        for seed in bench.seeds:
            _collected(bench, seed)
        yardstick.prepare(bench.yardstick)
    else:
        _measure(bench, next(cell for cell in bench.cells if cell.name == job))


def missing(bench: Comparison) -> list[Cell]:
    """Return the cells that have yet to measure an activation width."""
    return [cell for cell in bench.cells if _lacking(bench, cell)]


def result(bench: Comparison, cell: Cell) -> dict[str, Any] | None:
    """Return what a cell measured so far, or None."""
    path = bench.path(cell, ".json")
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def pictures_path(bench: Comparison, cell: Cell, abits: int) -> Path:
    """Return where the first SHOWN images of a cell are kept."""
    return bench.path(cell, f"-a{abits}.safetensors")


def plan_at(
    model: LoadedModel,
    data: CalibrationSet,
    config: QuantConfig,
    abits: int,
    folder: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QuantPlan:
    """Return the plan of `config` at another activation width.

    The blocks that `folder` holds from one width serve all others, so that only the ranges are observed again. They
    are, rather than old scales stretched, because a scale in float32 no longer has every bit of its magnitude.
    """
    config = dataclasses.replace(config, activation=dataclasses.replace(config.activation, bits=abits))
    return learn(model, data, config, model.spec.sampler, folder=folder, on_progress=on_progress)


def _measure(bench: Comparison, cell: Cell) -> None:
    """Calibrate once for each activation width that is missing, and write down what comes of it."""
    y, model = bench.yardstick, bench.model
    data = _collected(bench, cell.seed)
    config, blocks = bench.config(cell), bench.path(cell, "")
    found = result(bench, cell) or {"activations": {}}
    for abits in _lacking(bench, cell):
        clock = Clock(blocks / "clock.json")
        plan = plan_at(model, data, config, abits, blocks, clock.on_progress)
        if "seconds" not in found:
            found |= clock.read() | {
                "workers": bench.workers,
                "version": version(),
                "config": configs.to_json(config),
                "omega_spread": omega_spread(plan),
                "block_losses": {b.name: b.loss_after for b in plan.blocks if b.loss_after is not None},
            }
            if bench.weights_alone:
                weights = fake_quantized(model.network, plan, activations=False)
                found["weights_error"] = yardstick.noise_errors(y, weights)
        network = apply_surgery(model.network, plan.surgery)
        macs = cost.layer_macs(network, model.shape, model.schedule.num_train, model.condition_inputs)
        measured: dict[str, Any] = {
            "bytes": cost.weight_bytes(network, plan),
            "bit_operations": cost.bit_operations(macs, plan),
        }
        with yardstick.quantized(y, plan) as denoise:
            measured["error"] = yardstick.noise_errors(y, denoise, plan.correction)
            drawn = yardstick.pictures(y, denoise, plan.correction) if y.images else None
        if drawn is not None:
            measured |= yardstick.picture_measures(y, drawn)
            write_atomically(pictures_path(bench, cell, abits), save({"images": drawn[:SHOWN].contiguous()}))
        found["activations"][str(abits)] = measured
        write_atomically(bench.path(cell, ".json"), json.dumps(found, indent=1).encode())


class Clock:
    """Processor seconds and peak memory of a calibration, also of one that was killed and continued.

    A process has one thread, so that on a quiet machine they are the seconds a user waits; on a busy one they are less.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.process_time()
        self._before: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "peak_mib": None}
        )

    def read(self) -> dict[str, float | None]:
        """Return seconds in all processes together, and the largest peak in MiB, None where the system has none."""
        seconds = self._before["seconds"] + time.process_time() - self._started
        peaks = [peak for peak in (self._before["peak_mib"], peak_memory_mib()) if peak is not None]
        return {"seconds": seconds, "peak_mib": max(peaks, default=None)}

    def on_progress(self, progress: Progress) -> None:
        """Write down what a finished block has cost so far."""
        if progress.result is not None and not progress.resumed:
            write_atomically(self._path, json.dumps(self.read()).encode())


def omega_spread(plan: QuantPlan) -> float:
    """Return the standard deviation of softmax(scores / tau) over the training samples, times their number."""
    omega = torch.softmax(plan.scores / plan.config.omega.temperature, 0)
    return float(omega.std(correction=0)) * len(omega)


def _collected(bench: Comparison, seed: int) -> CalibrationSet:
    return collected(bench.model, bench.schedule, seed, bench.yardstick.folder)


def _lacking(bench: Comparison, cell: Cell) -> list[int]:
    """Return the activation widths that a cell has yet to measure."""
    have = (result(bench, cell) or {"activations": {}})["activations"]
    return [a for w, a in bench.bits if w == cell.wbits and str(a) not in have]


def _spawn(bench: Comparison, job: str, say: Callable[[str], None]) -> bool:
    """Run this command again for one job, with one thread, its output in a log; return whether it succeeded."""
    started, log = time.perf_counter(), _log(bench, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        own = Path(sys.argv[0]).name in ("gaq-export", "__main__.py")
        program = ["-m", "gaq_export"] if own else [sys.argv[0]]
        command = [sys.executable, *program, *sys.argv[1:], "--job", job]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=stream, stderr=stream, env=threads, check=False).returncode
    say(f"{job}: {'done' if code == 0 else f'failed, see {log}'} after {time.perf_counter() - started:.0f} s")
    return code == 0


def _log(bench: Comparison, job: str) -> Path:
    return bench.yardstick.folder / "logs" / f"{job}.log"
