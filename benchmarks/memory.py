"""How much memory and time does calibration take at full size? The first and the largest block of the CIFAR-10 U-Net.

    python benchmarks/memory.py --out docs/results/memory-ddpm-cifar10.md

Random weights and Gaussian noise as samples: what is measured does not depend on their values. All other layers stay
float, so that the run ends; the recordings are those of a whole calibration, since every block is recorded alike.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from calib.calibrate import calibrate
from calib.data import CalibrationSet
from calib.layers import trace
from calib.progress import Progress
from gaq_export.models import LoadedModel, load_model
from gaq_export.presets import preset
from gaq_export.run import peak_memory_mib
from gaq_export.schedule import timesteps
from options import ModelName, Out
from publish import machine, markdown_table, publish

PHASES = ("record", "start", "meta", "fit", "decide")


def main(
    model: ModelName = "ddpm-cifar10",
    blocks: Annotated[str, typer.Option(help="Names, with commas between them.")] = (
        "unet.down_blocks.0.resnets.0,unet.up_blocks.3.resnets.0"
    ),
    samples: Annotated[int, typer.Option(help="That calibrate weights; the paper's 20 steps x 256.")] = 5120,
    iterations: Annotated[int, typer.Option(help="Of each block; memory does not depend on it.")] = 50,
    out: Out = None,
) -> None:
    """Calibrate the named blocks with the paper's batch sizes."""
    loaded = load_model(model, "random")
    config = preset("paper").config
    data = _noise(loaded, config.weight_steps, samples)
    names = blocks.split(",")
    found = trace(loaded.network, loaded.shape, loaded.schedule.num_train)
    others = [layer.name for layer in found.layers if not any(layer.name.startswith(f"{n}.") for n in names)]
    config = replace(
        config,
        keep_float=tuple(others),
        reconstruction=replace(config.reconstruction, iterations=iterations, start="gptq"),
        omega=replace(config.omega, meta_steps=5),
        activation=replace(config.activation, batches=4),
    )
    last: Mapping[str, float] = {}
    rows: list[list[str]] = []

    def keep(progress: Progress) -> None:
        nonlocal last
        if progress.result is not None:
            spent = [progress.seconds.get(phase, 0.0) - last.get(phase, 0.0) for phase in PHASES]
            rows.append([progress.name, *(f"{seconds:.0f}" for seconds in spent), f"{peak_memory_mib()}"])
            print(*rows[-1], sep="  ", flush=True)
            last = progress.seconds

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibrate(
            loaded.network,
            data,
            config,
            timesteps=loaded.schedule.num_train,
            folder=Path(folder),
            on_progress=keep,
        )
    head = [
        f"{model}, random weights, {len(data)} samples, batch {config.reconstruction.batch},",
        f"{iterations} iterations and {config.omega.meta_steps} meta-steps of {config.omega.batch} samples a block.",
        f"{torch.get_num_threads()} threads, {machine()}, torch {torch.__version__}.",
        f"{time.perf_counter() - started:.0f} s in all, peak resident memory of the process {peak_memory_mib()} MiB.",
        "",
    ]
    publish([*head, *markdown_table(("block", *(f"{phase} s" for phase in PHASES), "peak MiB so far"), rows)], out)


def _noise(model: LoadedModel, weight_steps: int, samples: int) -> CalibrationSet:
    """Return Gaussian noise for the steps that calibrate weights, equally many samples a step."""
    spec = model.spec.sampler
    steps = timesteps(spec, model.schedule.num_train)[:: spec.steps // weight_steps]
    count = samples // len(steps)
    x = torch.randn(len(steps) * count, *model.shape, generator=torch.Generator().manual_seed(0))
    return CalibrationSet(x=x, t=steps.repeat_interleave(count), step=torch.arange(len(steps)).repeat_interleave(count))


if __name__ == "__main__":
    typer.run(main)
