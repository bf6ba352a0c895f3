"""Time the whole denoising loop: diffusers' pipeline in PyTorch against our engines, side by side in one run.

    python benchmarks/loop.py --model ddpm-cifar10 --weights random --steps 50 --batch 4

The contestants take turns, so that whatever else the machine does falls on all of them; medians and ratios are
reported. Weights may be random: time does not depend on them. Every contestant is given the same number of threads.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler

import engines
from engines import EngineConfig
from gaq_export import samplers
from gaq_export.denoiser import engine_denoiser
from gaq_export.onnx_export import export_float
from gaq_export.pipeline import LoadedModel, build_engine, calibrate, load_model, preset
from gaq_export.qdq import save_onnx
from gaq_export.schedule import SamplerSpec
from options import Out
from publish import machine, markdown_table, publish


def main(
    model: Annotated[str, typer.Option()] = "ddpm-cifar10",
    weights: Annotated[str | None, typer.Option(help="Folder, or 'random'.")] = "random",
    steps: Annotated[int, typer.Option()] = 50,
    batch: Annotated[int, typer.Option()] = 4,
    rounds: Annotated[int, typer.Option()] = 5,
    out: Out = None,
) -> None:
    """Print one table: seconds a loop, images a second, and the ratio to PyTorch."""
    loaded = load_model(model, weights)
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(loaded, SamplerSpec(steps=steps), batch, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for loop in contestants.values():
            loop()  # warm-up
        for _ in range(rounds):
            for name, loop in contestants.items():
                started = time.perf_counter()
                loop()
                times[name].append(time.perf_counter() - started)
    title = f"{model}, {steps} DDIM steps, batch {batch}, {rounds} rounds, {machine()}, torch {torch.__version__}."
    publish([title, "", *_table(times, batch)], out)


def _contestants(model: LoadedModel, spec: SamplerSpec, batch: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return the loops by name; the first is the reference."""
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipeline = DDIMPipeline(unet=model.unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    loops: dict[str, Callable[[], object]] = {
        "PyTorch FP32 (diffusers DDIMPipeline)": lambda: pipeline(
            batch_size=batch, num_inference_steps=spec.steps, output_type="np"
        )
    }
    calibrate(model, preset("tiny"), folder=folder)
    for backend in ("openvino", "onnxruntime"):
        config = EngineConfig(backend=backend, batch=(batch, batch, batch))
        built = build_engine(folder=folder, out=folder / f"{backend}.plan", config=config, model=model)
        loops[f"{backend} W4A8"] = _loop(engines.open_engine(built.file), model, spec, batch)
    floats = folder / "float.onnx"
    save_onnx(export_float(model.network, model.shape), floats)
    for backend in ("openvino", "onnxruntime"):
        config = EngineConfig(backend=backend, batch=(batch, batch, batch))
        file = engines.build(floats, folder / f"{backend}-float.plan", config)
        loops[f"{backend} FP32"] = _loop(engines.open_engine(file), model, spec, batch)
    return loops


def _loop(engine: engines.Engine, model: LoadedModel, spec: SamplerSpec, batch: int) -> Callable[[], object]:
    denoise = engine_denoiser(engine)
    return lambda: samplers.run(denoise, list(range(batch)), model.shape, model.schedule, spec)


def _table(times: dict[str, list[float]], batch: int) -> list[str]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = next(iter(medians.values()))
    rows = [
        (
            name,
            f"{seconds:.2f}",
            f"{batch / seconds:.2f}",
            f"{reference / seconds:.2f} x",
            f"{min(times[name]):.2f} to {max(times[name]):.2f}",
        )
        for name, seconds in medians.items()
    ]
    return markdown_table(("loop", "median s", "images/s", "against PyTorch", "range s"), rows)


if __name__ == "__main__":
    typer.run(main)
