"""What could any weighting of the calibration samples gain at best? One network calibrated for each part of the steps.

    python benchmarks/ceiling.py --out docs/results/ceiling-ddpm-mnist.md

Sample weights can only shift attention between samples. So the sampling steps are cut into the five groups that GAC
compares, the network is calibrated five times, each time with the samples of one group alone (as many samples, the
same number of iterations, uniform weights), and each of the five is measured on its own group's steps. The set of five
is no network that a weighting could produce; it marks what the weighting of a single network cannot reach.
The last column is the other ceiling: weights of 8 bits, which leave almost nothing to gain.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from calib.calibrate import calibrate
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from command import write_markdown
from gaq_export.comparison import yardstick
from gaq_export.comparison.spec import calibration_set
from gaq_export.comparison.yardstick import HELD_OUT, ComputedBy, Yardstick
from gaq_export.models.loader import load_model
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.report.markdown import markdown_table
from options import Folder, ModelName, Out, Workers

GROUPS = 5
HEAD = ("steps", "own group only, weights alone", "own group only, W4A8", "W8A8 instead of W4A8")
Errors = tuple[list[float], list[float]]  # squared error at each step: weights rounded, activations too


def main(
    model: ModelName = "ddpm-mnist",
    seed: Annotated[int, typer.Option()] = 0,
    workers: Workers = 2,
    folder: Folder = Path("bench-ceiling"),
    out: Out = None,
) -> None:
    """Calibrate for all steps, for each group alone, and at 8 bits; compare group by group."""
    jobs = [(4, None), (8, None), *((4, k) for k in range(GROUPS))]
    calibration_set(load_model(model), preset("fast"), seed, folder)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(partial(_errors, model, folder, seed), *zip(*jobs, strict=True)))
    whole, eight, groups = errors[0], errors[1], errors[2:]
    size = len(whole[0]) // GROUPS
    rows, gains = [], []
    for k in range(GROUPS):
        at = slice(k * size, (k + 1) * size)
        gains.append([_gain(whole[a][at], other[a][at]) for other, a in ((groups[k], 0), (groups[k], 1), (eight, 1))])
        rows.append((f"{at.start} to {at.stop - 1}", *_shown(gains[-1])))
    rows.append(("mean", *_shown([sum(column) / GROUPS for column in zip(*gains, strict=True)])))
    head = [
        f"{model}, W4A8 and its weights alone, seed {seed}, {HELD_OUT} held-out trajectories; gain in dB of the",
        "predicted noise's SQNR over the network calibrated with the samples of all steps (mean over a group's steps).",
        "In the W4A8 column the activation ranges, too, come from the group alone. Half the squared error is 3.01 dB.",
        "",
    ]
    write_markdown([*head, *markdown_table(HEAD, rows)], out)


def _shown(gains: list[float]) -> list[str]:
    return [f"{gain:+.2f}" for gain in gains]


def _gain(before: list[float], after: list[float]) -> float:
    return sum(10 * math.log10(b / a) for b, a in zip(before, after, strict=True)) / len(before)


def _errors(name: str, folder: Path, seed: int, bits: int, group: int | None) -> Errors:
    """Calibrate with the samples of one group of steps, or of all; measure at every step."""
    torch.set_num_threads(1)
    model, chosen = load_model(name), preset("fast", CalibrationOptions(wbits=bits, omega="uniform", seed=seed))
    data = _of_group(calibration_set(model, chosen, seed, folder), group)
    plan = calibrate(model.network, data, chosen.config, timesteps=model.schedule.num_train)
    bench = Yardstick(model=model, folder=folder, images=0, computed_by=ComputedBy.PYTORCH)
    weights, both = (
        yardstick.noise_errors(bench, fake_quantized(model.network, plan, activations=rounded))
        for rounded in (False, True)
    )
    return weights, both


def _of_group(data: CalibrationSet, group: int | None) -> CalibrationSet:
    if group is None:
        return data
    steps = int(data.step.max()) + 1
    return data.take((data.step * GROUPS // steps == group).nonzero()[:, 0])


if __name__ == "__main__":
    typer.run(main)
