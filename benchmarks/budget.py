"""Does an engine keep to a budget of milliseconds?

    python benchmarks/budget.py --folder bench-budget --out docs/results/budget-ddpm-mnist.md

The budgets lie between the fastest width and float, as `calib.mixed_precision` has measured them. Each is calibrated
(in the tiny preset: rounding does not change time), built, and timed, a step of a batch, all engines in turn.
"""

import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import engines
from calib.config import FLOAT_BITS, MixedConfig
from calib.plan import QuantPlan
from command import command_line, write_markdown
from engines import EngineConfig, EngineFile
from gaq_export.evaluation.timing import take_turns
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.pipeline import build_engine, calibrate
from gaq_export.quantize.latency import BATCH, StepClock
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.report.markdown import machine, markdown_table
from gaq_export.run import Run
from options import ModelName, Out, Weights


def main(
    model: ModelName = "ddpm-mnist",
    weights: Weights = None,
    folder: Annotated[Path, typer.Option(help="Keeps runs and engines.")] = Path("bench-budget"),
    shares: Annotated[
        str, typer.Option(help="Where the budgets lie, from the fastest (0) to float (1).")
    ] = "0.2,0.5,0.8",
    rounds: Annotated[int, typer.Option()] = 50,
    out: Out = None,
) -> None:
    """Write one row for each budget."""
    loaded = load_model(model, weights)
    uniform = Run(folder=folder / "uniform")
    layers = list(calibrate(loaded, preset("tiny"), folder=uniform.folder).layers)
    measured = folder / "times.json"
    times = StepClock(model=loaded, cache=measured)(loaded.network, layers, MixedConfig().choices)
    low, high = min(times.values()), times[FLOAT_BITS]
    loops = {"4 bits": _step(loaded, uniform), "float": _float_step(loaded, folder)}
    plans = dict[str, QuantPlan]()
    for share in map(float, shares.split(",")):
        budget = f"{low + share * (high - low):.1f}ms"
        run = Run(folder=folder / budget)
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(measured, run.times)  # one measurement for all budgets
        plans[budget] = calibrate(loaded, preset("tiny", CalibrationOptions(budget=budget)), folder=run.folder)
        loops[budget] = _step(loaded, run)
    seconds = take_turns(loops, rounds)
    rows = [
        (budget, f"{1000 * statistics.median(seconds[budget]):.1f}", *_shares(plan)) for budget, plan in plans.items()
    ]
    uniform_times = ", ".join(
        f"{'float' if bits == FLOAT_BITS else f'{bits} bits'} {ms:.1f} ms" for bits, ms in times.items()
    )
    head = ("budget", "measured, median ms", "layers of 4 bits", "of 8", "float")
    now = ", ".join(f"{name} {1000 * statistics.median(seconds[name]):.1f} ms" for name in ("4 bits", "float"))
    title = (
        f"{model}, a step of {BATCH} images, {machine()}; with all layers at one width, as the budget was measured: "
        f"{uniform_times}; in the same rounds as the table: {now}."
    )
    lines = ["# Budgets of milliseconds", "", f"    {command_line()}", "", title, "", *markdown_table(head, rows)]
    write_markdown(lines, out)


def _float_step(model: LoadedModel, folder: Path) -> Callable[[], Any]:
    graph = export_float(model.network, model.shape)
    rewrite_for_openvino(graph)
    save_onnx(graph, folder / "float.onnx")
    config = EngineConfig(backend="openvino", batch=(BATCH, BATCH, BATCH))
    return _once(model, engines.build(folder / "float.onnx", folder / "float.plan", config))


def _step(model: LoadedModel, run: Run) -> Callable[[], Any]:
    config = EngineConfig(backend="openvino", batch=(BATCH, BATCH, BATCH))
    built = build_engine(folder=run.folder, out=run.folder / "unet.plan", config=config, graph="eps", model=model)
    return _once(model, built.file)


def _once(model: LoadedModel, file: EngineFile) -> Callable[[], Any]:
    x = np.random.default_rng(0).standard_normal((BATCH, *model.shape), np.float32)
    return partial(engines.open_engine(file), {"x": x, "t": np.full(BATCH, model.schedule.num_train // 2)})


def _shares(plan: QuantPlan) -> tuple[str, ...]:
    counts = Counter(layer.weight_bits for layer in plan.layers.values())
    chosen = sum("budget" in reason for reason in plan.float_layers.values())
    return f"{counts[4]}", f"{counts[8]}", f"{chosen}"


if __name__ == "__main__":
    typer.run(main)
