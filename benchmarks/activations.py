"""What do activation grids per step, and grids that follow the range of the values, gain and cost?

    python benchmarks/activations.py --folder bench-activations --out docs/results/activations-ddpm-mnist.md

The rounding of the weights is learned once; only the grids of the activations differ. SQNR is that of the predicted
noise against the float network on trajectories that calibration never sees; time is that of a whole loop on OpenVINO.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import engines
from calib.calibrate import calibrate
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, save_plan
from calib.sqnr import sqnr_db
from command import write_markdown
from engines import EngineConfig, EngineFile
from gaq_export.deploy import session, step_loop
from gaq_export.diffusion import loop
from gaq_export.evaluation.timing import take_turns
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.provenance import Provenance
from gaq_export.pipeline import build_engine
from gaq_export.quantize.presets import preset
from gaq_export.quantize.trajectories import collect, image_seed
from gaq_export.report.markdown import machine, markdown_table
from options import ModelName, Out

FORMS = {  # (a grid for each step, 0 in the middle)
    "one symmetric grid": (False, True),
    "a symmetric grid for each step": (True, True),
    "one grid, moved": (False, False),
    "a grid for each step, moved": (True, False),
}


def main(
    model: ModelName = "ddpm-mnist",
    weights: Annotated[str | None, typer.Option(help="Folder, or 'random' (then only time means anything).")] = None,
    schedule: Annotated[str, typer.Option("--preset")] = "fast",
    folder: Annotated[Path, typer.Option(help="Keeps the calibration.")] = Path("bench-activations"),
    widths: Annotated[str, typer.Option(help="Activation bits.")] = "8,6,4",
    images: Annotated[int, typer.Option(help="Held-out images.")] = 16,
    batch: Annotated[int, typer.Option(help="Of the loop that is timed.")] = 4,
    rounds: Annotated[int, typer.Option()] = 9,
    out: Out = None,
) -> None:
    """Print one row for each form."""
    loaded = load_model(model, weights)
    bits = [int(width) for width in widths.split(",")]
    made = preset(schedule)
    data = collect(loaded, loaded.spec.sampler, images=made.images, folder=folder / "calibration")
    samples = held_out(loaded, images)
    measured: dict[str, list[float]] = {}
    loops: dict[str, Callable[[], object]] = {}
    layers: dict[str, str] = {}
    for name, (per_step, symmetric) in FORMS.items():
        plans = {}
        for width in bits:
            activation = replace(made.config.activation, bits=width, per_step=per_step, symmetric=symmetric)
            config = replace(made.config, activation=activation)
            plans[width] = learn(loaded, data, config, folder)
        measured[name] = [_mean_sqnr(loaded, plan, samples) for plan in plans.values()]
        measured[name].append(_mean_sqnr(loaded, plans[bits[0]], samples, float8=True))
        moved = sum(any(layer.input.zero) for layer in plans[bits[0]].layers.values())
        layers[name] = f"{moved} of {len(plans[bits[0]].layers)}"
        loops[name] = _loop(loaded, _engine(loaded, plans[bits[0]], folder / f"form-{len(loops)}", batch), batch)
        print(name, measured[name], layers[name], flush=True)
    seconds = take_turns(loops, rounds)
    reference = statistics.median(seconds["one symmetric grid"])
    rows = [
        (
            name,
            layers[name],
            *(f"{db:.2f}" for db in measured[name]),
            f"{statistics.median(seconds[name]):.2f}",
            f"{statistics.median(seconds[name]) / reference:.2f} x",
        )
        for name in FORMS
    ]
    head = ["activation grids", "layers moved", *(f"W4A{width}, dB" for width in bits), "W4 FP8, dB", "loop, s", "time"]
    title = [
        f"{model}, {loaded.spec.sampler}; {made.images} calibration images, seed 0; mean SQNR over steps, {images} "
        "held-out images.",
        f"Loop: batch {batch}, OpenVINO, W4A{bits[0]}, median of {rounds} rounds in turn. {machine()}, torch "
        f"{torch.__version__}.",
    ]
    write_markdown([*title, "", *markdown_table(head, rows)], out)


def learn(model: LoadedModel, data: CalibrationSet, config: QuantConfig, folder: Path) -> QuantPlan:
    """Calibrate, keeping the blocks in the folder."""
    about = Provenance.of(model, model.spec.sampler).to_json()
    blocks = folder / "blocks"
    return calibrate(model.network, data, config, timesteps=model.schedule.num_train, provenance=about, folder=blocks)


def held_out(model: LoadedModel, images: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return x, t and the float network's noise at every step of trajectories that no calibration sees."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(step: int, x: Tensor, t: Tensor) -> None:
        seen.append((x.clone(), t, model.network(x, t)))

    seeds = [image_seed(0, i, "held-out activations") for i in range(images)]
    loop.run(model.network, seeds, model.sampling(), keep)
    return seen


def _mean_sqnr(
    model: LoadedModel, plan: QuantPlan, samples: list[tuple[Tensor, Tensor, Tensor]], *, float8: bool = False
) -> float:
    fake = fake_quantized(model.network, plan, float8=float8)
    with torch.no_grad():
        return statistics.fmean(sqnr_db(expected, fake(x, t)) for x, t, expected in samples)


def _engine(model: LoadedModel, plan: QuantPlan, folder: Path, batch: int) -> EngineFile:
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(plan, folder / "plan.safetensors")
    config = EngineConfig(backend="openvino", batch=(batch, batch, batch))
    return build_engine(folder=folder, out=folder / "unet.plan", config=config, model=model).file


def _loop(model: LoadedModel, file: EngineFile, batch: int) -> Callable[[], object]:
    engine = engines.open_engine(file)
    return lambda: step_loop.run(engine, range(batch), session.sampling_of(file))


if __name__ == "__main__":
    typer.run(main)
