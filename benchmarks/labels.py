"""Does a quantized network draw the class that it was asked for? Its images and float's, read by a classifier.

    python benchmarks/labels.py --steps 20 --out docs/results/labels-ddpm-mnist.md

Both draw with an OpenVINO engine of steps, from the same noise, with guidance; `--features digits` says what an image
shows. Intervals of shares are Wilson's; the difference is resampled image by image, since both saw the same noise. The
same command goes on where it was.
"""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from command import command_line, one_line_errors, write_markdown
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.cli.options import SamplerName, replace_options
from gaq_export.deploy.build import build_float
from gaq_export.evaluation import frechet
from gaq_export.evaluation.feature_extractors import Extractor, find_extractor
from gaq_export.images import psnr, save_grid
from gaq_export.models.conditioning_request import ConditioningRequest, condition_model
from gaq_export.models.loader import load_model
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.report.markdown import machine, markdown_table
from gaq_export.sampling import shards
from options import ModelName, Out, PresetName, Weights

SHARD, BOOTSTRAP_DRAWS = 50, 10_000
Z = 1.959964  # 97.5 % of a normal distribution lie below it
HEAD = ("", "images", "as asked", "share", "95 % interval", "PSNR against float, median dB")


def main(
    model: ModelName = "ddpm-mnist-labels",
    weights: Weights = None,
    schedule: PresetName = "fast",
    wbits: Annotated[int, typer.Option()] = 4,
    abits: Annotated[int, typer.Option()] = 8,
    guidance: Annotated[float, typer.Option()] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps, instead of the model's.")] = None,
    sampler: SamplerName = None,
    images: Annotated[int, typer.Option(help="That each network draws.")] = 500,
    features: Annotated[str, typer.Option(help="The classifier.")] = "digits",
    folder: Annotated[Path, typer.Option(help="Keeps the calibration, engines and images.")] = Path("bench-labels"),
    out: Out = None,
) -> None:
    """Write one row for each network, the difference, and a grid of the first images."""
    with one_line_errors():
        conditioned = condition_model(load_model(model, weights), ConditioningRequest(guidance=guidance))
        assert conditioned.conditioning is not None
        config = EngineConfig(backend="openvino", threads=1)
        chosen = pipeline.preset(schedule, CalibrationOptions(wbits=wbits, abits=abits))
        spec = replace_options(conditioned.spec.sampler, steps=steps, name=sampler)
        pipeline.calibrate(conditioned, chosen, folder=folder / "run", sampler=spec)
        bits = f"W{wbits}A{abits}"
        files = {
            "float": build_float(conditioned, folder / "float.plan", sampler=spec, config=config),
            bits: pipeline.build_engine(folder=folder / "run", out=folder / "unet.plan", config=config).file,
        }
        drawn = {name: _drawn(file, folder / f"images-{name}", images) for name, file in files.items()}
        reader = find_extractor(features)
        labels = torch.tensor([int(conditioned.conditioning.name_of(seed)) for seed in range(images)])
        right = {name: _read(reader, pictures) == labels for name, pictures in drawn.items()}
    near = psnr(frechet.pixels(drawn[bits]), frechet.pixels(drawn["float"])).median()
    rows = [(*_share(name, right[name]), db) for name, db in (("float", "-"), (bits, f"{float(near):.1f}"))]
    lines = [
        f"# The right class? {conditioned.spec.name}, {bits}, guidance {guidance:g}",
        "",
        f"    {command_line()}",
        "",
        f"{spec}; {machine()}; preset {schedule}, seed 0; seeds 0 to {images - 1}, the image of seed s is "
        f"of class s mod {len(conditioned.conditioning.names)}; read by `{features}`.",
        "",
        *markdown_table(HEAD, rows),
        "",
        _difference(right["float"], right[bits], bits),
    ]
    if out is not None:
        shown = [(name, frechet.pixels(pictures[:20])) for name, pictures in drawn.items()]
        save_grid(out.with_suffix(".png"), shown, titles=[conditioned.conditioning.name_of(seed) for seed in range(20)])
        lines += ["", f"![The first images, float above {bits}]({out.stem}.png)"]
    write_markdown(lines, out)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    share, width = hits / count, Z**2 / count
    middle = (share + width / 2) / (1 + width)
    half = Z * math.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    return middle - half, middle + half


def _share(name: str, hits: Tensor) -> tuple[str, ...]:
    low, high = wilson(int(hits.sum()), len(hits))
    share = f"{100 * hits.double().mean():.1f} %"
    return name, f"{len(hits)}", f"{int(hits.sum())}", share, f"{100 * low:.1f} to {100 * high:.1f} %"


def _drawn(file: EngineFile, folder: Path, count: int) -> Tensor:
    pipeline.sample_shards(file.path, num=count, out=folder, shard=SHARD)
    return torch.cat([images for images, _ in shards.read_shards(folder)])


def _read(reader: Extractor, images: Tensor) -> Tensor:
    return reader(images).logits.argmax(1)


def _difference(exact: Tensor, ours: Tensor, bits: str) -> str:
    """Say by how much the shares differ, and how often only one of both networks drew the class asked for."""
    paired = ours.numpy().astype(float) - exact.numpy().astype(float)
    draws = np.random.default_rng(0).choice(paired, (BOOTSTRAP_DRAWS, len(paired))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    one, other = int((paired < 0).sum()), int((paired > 0).sum())
    return (
        f"Difference {bits} less float: {100 * paired.mean():+.1f} points, 95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f} ({BOOTSTRAP_DRAWS} bootstrap draws of pairs). Of {len(paired)} pairs {one} are right "
        f"by float alone, {other} by {bits} alone."
    )


if __name__ == "__main__":
    typer.run(main)
