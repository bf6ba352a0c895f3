"""What should temporal tables hold? The noise predicted with the time embedding's layers rounded, and with them exact.

    python benchmarks/tables.py --folder bench-tables --out docs/results/tables-ddpm-mnist.md

Convention tfmq quantizes such layers; deploy leaves them float. The plan is the same; the layers that depend on the
step alone are rounded in one network, as the tables of an engine of steps have it, and exact in the other.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from activations import held_out, learn
from calib.fakequant import fake_quantized
from calib.sqnr import sqnr_db
from command import write_markdown
from gaq_export.graph.export import export_float
from gaq_export.graph.step import make_step
from gaq_export.models.loader import load_model
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.quantize.trajectories import collect
from gaq_export.report.markdown import markdown_table
from options import ModelName, Out

SHOWN = 6  # steps that have a column


def main(
    model: ModelName = "ddpm-mnist",
    schedule: Annotated[str, typer.Option("--preset")] = "fast",
    folder: Annotated[Path, typer.Option(help="Keeps the calibrations.")] = Path("bench-tables"),
    images: Annotated[int, typer.Option(help="Held-out images.")] = 16,
    out: Out = None,
) -> None:
    """Print one row with the layers rounded, and one with them exact."""
    loaded = load_model(model)
    spec = loaded.spec.sampler
    baked = make_step(export_float(loaded.network, loaded.shape), loaded.schedule, spec).baked
    held_out_noise = held_out(loaded, images)
    shown = torch.linspace(0, spec.steps - 1, SHOWN).round().int().tolist()
    made = preset(schedule, CalibrationOptions(convention="tfmq"))
    data = collect(loaded, spec, images=made.images, folder=folder / "calibration")
    plan = learn(loaded, data, made.config, folder)
    left = {name: layer for name, layer in plan.layers.items() if name not in baked}
    rows = []
    for name, layers in (("rounded", plan.layers), ("exact", left)):
        fake = fake_quantized(loaded.network, replace(plan, layers=layers))
        with torch.no_grad():
            decibels = [sqnr_db(expected, fake(x, t)) for x, t, expected in held_out_noise]
        rows.append((name, f"{statistics.fmean(decibels):.2f}", *(f"{decibels[step]:.2f}" for step in shown)))
        print(*rows[-1], flush=True)
    title = (
        f"{model} W4A8, convention tfmq, which quantizes {len(plan.layers) - len(left)} layers that depend on the step "
        f"alone; {spec}; {made.images} calibration images, seed 0; SQNR of the predicted noise in dB, {images} "
        "held-out images."
    )
    head = ["these layers", "mean", *(f"step {step}" for step in shown)]
    write_markdown([title, "", *markdown_table(head, rows)], out)


if __name__ == "__main__":
    typer.run(main)
