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

from calib.calibrate import calibrate, weight_samples
from calib.choices import RoundingStart
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.progress import Progress
from calib.trace import trace
from command import write_markdown
from gaq_export.diffusion.schedule import timesteps
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.quantize.presets import preset
from gaq_export.report.markdown import machine, markdown_table
from gaq_export.run import peak_memory_mib
from options import ModelName, Out

PHASES = ("record", "start", "meta", "fit", "decide")


def main(
    model: ModelName = "ddpm-cifar10",
    blocks: Annotated[str, typer.Option(help="Names, with commas between them.")] = (
        "unet.down_blocks.0.resnets.0,unet.up_blocks.3.resnets.0"
    ),
    images: Annotated[int, typer.Option(help="Trajectories; each gives a sample at every sampling step.")] = 256,
    iterations: Annotated[int, typer.Option(help="Of each block; memory does not depend on it.")] = 50,
    out: Out = None,
) -> None:
    """Calibrate the named blocks with the paper's batch sizes."""
    loaded = load_model(model, "random")
    config = _shortened(loaded, blocks.split(","), iterations)
    data = _noise(loaded, images)
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
    samples = len(weight_samples(data, config, loaded.network).data)
    head = [
        f"{model}, random weights, {images} images, {samples} samples for the weights;",
        f"{iterations} iterations of {config.reconstruction.batch} and {config.omega.meta_steps} meta-steps a block.",
        f"{torch.get_num_threads()} threads, {machine()}, torch {torch.__version__}.",
        f"{time.perf_counter() - started:.0f} s in all, peak resident memory of the process {peak_memory_mib()} MiB.",
        "",
    ]
    write_markdown(
        [*head, *markdown_table(("block", *(f"{phase} s" for phase in PHASES), "peak MiB so far"), rows)], out
    )


def _shortened(model: LoadedModel, names: list[str], iterations: int) -> QuantConfig:
    """Return the paper's config for the named blocks alone, with less of what only takes time."""
    traced = trace(model.network, model.shape, model.schedule.num_train)
    others = [layer.name for layer in traced.layers if not any(layer.name.startswith(f"{n}.") for n in names)]
    config = preset("paper").config
    return replace(
        config,
        keep_float=tuple(others),
        reconstruction=replace(config.reconstruction, iterations=iterations, start=RoundingStart.GPTQ),
        omega=replace(config.omega, meta_steps=5),
        activation=replace(config.activation, batches=4),
    )


def _noise(model: LoadedModel, images: int) -> CalibrationSet:
    """Return Gaussian noise, `images` samples at each sampling step."""
    steps = timesteps(model.spec.sampler, model.schedule.num_train)
    x = torch.randn(len(steps) * images, *model.shape, generator=torch.Generator().manual_seed(0))
    step = torch.arange(len(steps)).repeat_interleave(images)
    return CalibrationSet(x=x, t=steps[step], step=step)


if __name__ == "__main__":
    typer.run(main)
