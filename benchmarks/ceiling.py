"""What could any weighting of the calibration samples gain at best? One network calibrated for each part of the steps.

    python benchmarks/ceiling.py --out docs/results/ceiling-ddpm-mnist.md

Sample weights can only shift attention between samples. So the sampling steps are cut into the five groups that GAC
compares, the network is calibrated five times, each time with the samples of one group alone (as many samples, the
same number of iterations, uniform weights), and each of the five is measured on its own group's steps. The set of five
is no network that a weighting could give; it marks what a single network's weighting cannot be expected to reach.
The last column is the other ceiling: weights of 8 bits, in which there is next to nothing left to gain.
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
from gaq_export import samplers
from gaq_export.collect import collect
from gaq_export.models import LoadedModel, load_model
from gaq_export.presets import preset

GROUPS = 5
FIRST_SEED = 10_000  # of the held-out trajectories
Errors = tuple[list[float], list[float]]  # squared error at each step: weights rounded, activations too


def main(
    model: Annotated[str, typer.Option()] = "ddpm-mnist",
    images: Annotated[int, typer.Option(help="Held-out trajectories.")] = 16,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    folder: Annotated[Path, typer.Option(help="Keeps the calibration's trajectories.")] = Path("bench-ceiling"),
    out: Annotated[Path | None, typer.Option(help="Markdown page; printed if not given.")] = None,
) -> None:
    """Calibrate for all steps, for each group alone, and at 8 bits; compare group by group."""
    jobs = [(4, None), (8, None), *((4, k) for k in range(GROUPS))]
    _collected(load_model(model), folder, seed)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(partial(_errors, model, folder, images, seed), *zip(*jobs, strict=True)))
    whole, eight, own = found[0], found[1], found[2:]
    size = len(whole[0]) // GROUPS
    lines = [
        f"{model}, W4A8 and its weights alone, seed {seed}, {images} held-out trajectories; gain in dB of the",
        "predicted noise's SQNR over the network calibrated with the samples of all steps (mean over a group's steps).",
        "In the W4A8 column the activation ranges, too, come from the group alone. Half the squared error is 3.01 dB.",
        "",
        "| steps | own group only, weights alone | own group only, W4A8 | W8A8 instead of W4A8 |",
        "| --- | --- | --- | --- |",
    ]
    gains = []
    for k in range(GROUPS):
        at = slice(k * size, (k + 1) * size)
        gains.append([_gain(whole[a][at], other[a][at]) for other, a in ((own[k], 0), (own[k], 1), (eight, 1))])
        lines.append(f"| {at.start} to {at.stop - 1} | " + " | ".join(f"{g:+.2f}" for g in gains[-1]) + " |")
    means = [sum(column) / GROUPS for column in zip(*gains, strict=True)]
    lines.append("| mean | " + " | ".join(f"{g:+.2f}" for g in means) + " |")
    page = "\n".join(lines) + "\n"
    if out is None:
        print(page)
    else:
        out.write_text(page)


def _gain(before: list[float], after: list[float]) -> float:
    return sum(10 * math.log10(b / a) for b, a in zip(before, after, strict=True)) / len(before)


def _errors(name: str, folder: Path, images: int, seed: int, bits: int, group: int | None) -> Errors:
    """Calibrate with the samples of one group of steps, or of all; measure at every step."""
    torch.set_num_threads(1)
    model = load_model(name)
    chosen = preset("fast", wbits=bits, omega="uniform", seed=seed)
    data = _collected(model, folder, seed)
    plan = calibrate(model.network, _of_group(data, group), chosen.config, timesteps=model.schedule.num_train)
    networks = [fake_quantized(model.network, plan, activations=rounded) for rounded in (False, True)]
    return _measure(model, networks, images)


def _collected(model: LoadedModel, folder: Path, seed: int) -> CalibrationSet:
    count = preset("fast").images
    spec = model.spec.sampler
    return collect(model.network, model.shape, model.schedule, spec, images=count, seed=seed, folder=folder)


def _of_group(data: CalibrationSet, group: int | None) -> CalibrationSet:
    if group is None:
        return data
    steps = int(data.step.max()) + 1
    return data.take((data.step * GROUPS // steps == group).nonzero()[:, 0])


def _measure(model: LoadedModel, networks: list[torch.nn.Module], images: int) -> Errors:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    seeds = range(FIRST_SEED, FIRST_SEED + images)
    samplers.run(
        model.network,
        seeds,
        model.shape,
        model.schedule,
        model.spec.sampler,
        lambda _, x, t: seen.append((x.clone(), t.clone())),
    )
    weights: list[float] = []
    both: list[float] = []
    with torch.no_grad():
        for x, t in seen:
            expected = model.network(x, t).double()
            for errors, network in zip((weights, both), networks, strict=True):
                errors.append(float((network(x, t).double() - expected).square().sum()))
    return weights, both


if __name__ == "__main__":
    typer.run(main)
