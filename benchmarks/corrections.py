"""What do corrections of the predicted noise gain, with samplers that add noise and with one that does not?

    python benchmarks/corrections.py --folder bench-corrections --out docs/results/corrections-ddpm-mnist.md

One plan for each width; the correction is measured for each sampler. SQNR is that of the corrected noise on the float
network's trajectories, PSNR that of images against the float network's from the same noise; seeds are fresh for both.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from activations import learn
from calib.choices import CorrectionRule
from calib.config import QuantConfig
from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.sqnr import sqnr_db
from command import write_markdown
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.quantize import noise_correction
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.quantize.trajectories import collect, image_seed
from gaq_export.report.markdown import markdown_table
from options import ModelName, Out

SAMPLERS = (SamplerSpec(steps=50), SamplerSpec(steps=50, eta=1.0), SamplerSpec(name="ddpm", steps=50))
HEAD = ("plan", "sampler", "correction", "SQNR dB, mean", "R^2, median", "PSNR dB, median", "PSNR dB, worst")


def main(
    model: ModelName = "ddpm-mnist",
    schedule: Annotated[str, typer.Option("--preset")] = "fast",
    folder: Annotated[Path, typer.Option(help="Keeps the calibrations.")] = Path("bench-corrections"),
    widths: Annotated[str, typer.Option(help="Activation bits.")] = "8,4",
    images: Annotated[int, typer.Option(help="Fresh images.")] = 32,
    out: Out = None,
) -> None:
    """Print one row for each plan, sampler and correction."""
    loaded, made = load_model(model), preset(schedule, CalibrationOptions(recipe="adaround"))
    data = collect(loaded, loaded.spec.sampler, images=made.images, folder=folder / "calibration")
    rows = []
    for width in (int(w) for w in widths.split(",")):
        config = replace(made.config, activation=replace(made.config.activation, bits=width))
        quantized = fake_quantized(loaded.network, learn(loaded, data, config, folder))
        for spec in SAMPLERS:
            for row in _measured(loaded, quantized, config, spec, made.images, images, folder):
                name = f"{spec.name}, eta {spec.eta:g}" if spec.name == "ddim" else spec.name
                rows.append((f"W4A{width}", name, *row))
                print(*rows[-1], flush=True)
    title = f"{model}, 50 steps; {made.images} calibration images, seed 0; {images} fresh images."
    write_markdown([title, "", *markdown_table(HEAD, rows)], out)


def _measured(
    model: LoadedModel,
    quantized: nn.Module,
    config: QuantConfig,
    spec: SamplerSpec,
    calibrating: int,
    images: int,
    folder: Path,
) -> Iterator[tuple[str, ...]]:
    data = collect(model, spec, images=calibrating, folder=folder / f"calibration-{spec.name}-{spec.eta:g}")
    seeds = [image_seed(0, i, "fresh corrections") for i in range(images)]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(step: int, x: Tensor, t: Tensor) -> None:
        seen.append((x.clone(), t))

    exact = loop.run(model.network, seeds, model.sampling(spec), keep)
    with torch.no_grad():
        noise = [(model.network(x, t), quantized(x, t)) for x, t in seen]
    for rule in CorrectionRule:
        correction = None
        if rule != "none":
            chosen = replace(config, correction=replace(config.correction, rule=rule, images=calibrating))
            correction = noise_correction.measure_correction(model.with_sampler(spec), quantized, data, chosen)
        drawn = loop.run(quantized, seeds, replace(model.sampling(spec), correction=correction))
        near = sorted(psnr(exact, drawn).tolist())
        yield (
            rule,
            f"{statistics.fmean(_sqnr(noise, correction)):.2f}",
            "-" if correction is None else f"{statistics.median(correction.explained):.2f}",
            f"{statistics.median(near):.2f}",
            f"{near[0]:.2f}",
        )


def _sqnr(noise: list[tuple[Tensor, Tensor]], correction: Correction | None) -> Iterator[float]:
    for step, (expected, given) in enumerate(noise):
        if correction is not None:
            gain, bias = (torch.tensor(rows[step]).reshape(1, -1, 1, 1) for rows in (correction.gain, correction.bias))
            given = gain * (given - bias)
        yield sqnr_db(expected, given)


if __name__ == "__main__":
    typer.run(main)
