"""How much memory and time does a network of the size of Stable Diffusion 1.5 take, from floats to engines?

    nice -n 5 python benchmarks/large.py --out docs/results/large-sd15.md

Each stage is a separate process that starts from the files of the one before, so that its peak memory is its alone.
Weights are random and samples are noise: what is measured does not depend on their values. The graphs and engines are
of a plan that rounds weights to nearest, its activation grids all alike, so that they need not wait for a calibration.
A finished stage is not run again.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import torch
import typer

import engines
from calib.affine import quantize_weight, search_weight_scale
from calib.calibrate import calibrate
from calib.choices import RoundingStart
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.float_layers import float_reasons
from calib.plan import Grid, LayerQuant, QuantPlan, load_plan, save_plan
from calib.progress import Progress
from calib.trace import trace
from command import write_markdown
from engines import EngineConfig
from gaq_export.deploy import parity
from gaq_export.deploy.step_loop import step_denoiser
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.precision import compute_in
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.graph.step import make_step
from gaq_export.models.loader import LoadedModel, random_model
from gaq_export.models.registry import MODELS, reduced
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.report.markdown import machine, markdown_table
from options import Folder, Job, ModelName, Out

SPEC, IMAGES, BITS, GRID = SamplerSpec(steps=2), 2, 4, 2.0**-5
EVERY = 0.2  # seconds between looks at the memory of a stage's processes
HEAD = ("stage", "seconds", "CPU seconds", "peak GiB", "what came of it")


@dataclass(frozen=True)
class Place:
    """What a stage works with: the model, its width (0 is its own) and the folder where the stages meet."""

    name: str
    width: int
    folder: Path

    @property
    def model(self) -> LoadedModel:
        """The float model, made anew."""
        spec = MODELS[self.name]
        return random_model(reduced(spec, self.width) if self.width else spec)

    def file(self, name: str) -> Path:
        """Return a file in the folder."""
        return self.folder / name


def plan(place: Place) -> str:
    """Round the weights to nearest and write a plan of them; which layers, small images show as well."""
    model, config = place.model, preset("tiny", CalibrationOptions(recipe="rtn")).config
    traced = trace(model.network, (model.shape[0], 16, 16), model.schedule.num_train, model.condition_inputs)
    reasons = float_reasons(traced, config.convention)
    layers = {}
    for name in (layer.name for layer in traced.layers if layer.name not in reasons):
        weight = model.network.get_parameter(f"{name}.weight").detach()
        scale = search_weight_scale(weight, BITS, candidates=1)
        codes = quantize_weight(weight, scale, BITS)
        grid = Grid(scale=GRID, bits=8)
        layers[name] = LayerQuant(codes=codes, weight_scale=scale, weight_bits=BITS, input=grid, output_scale=GRID)
    made = QuantPlan(
        layers=layers,
        products={},
        float_layers=reasons,
        blocks=(),
        scores=torch.zeros(1),
        config=config,
        provenance={},
        num_train=model.schedule.num_train,
    )
    save_plan(made, place.file("plan.safetensors"))
    return f"{_counted(made)}; {_sizes(place, 'plan.*')}"


def nearest(place: Place) -> str:
    """Calibrate without learning anything."""
    return _calibrated(place, preset("tiny", CalibrationOptions(recipe="rtn")).config, "nearest")


def learned(place: Place) -> str:
    """Calibrate block by block, two iterations each."""
    config = preset("tiny", CalibrationOptions(recipe="adaround")).config
    shorter = replace(config.reconstruction, iterations=2, batch=2, start=RoundingStart.FLOAT)
    weight = replace(config.weight, candidates=4)
    return _calibrated(place, replace(config, reconstruction=shorter, weight=weight, micro_batch=2), "learned")


def float_graph(place: Place) -> str:
    """Write the float network, its weights beside it."""
    model = place.model
    save_onnx(export_float(model.network, model.shape, model.condition_inputs), place.file("float.onnx"))
    return _sizes(place, "float.onnx*")


def openvino_graph(place: Place) -> str:
    """Write the integers in, for OpenVINO."""
    return _quantized(place, "openvino", "float32")


def tensorrt_graph(place: Place) -> str:
    """Write the integers in, for TensorRT, the rest in FP16."""
    return _quantized(place, "trt", "float16")


def openvino(place: Place) -> str:
    """Build and audit."""
    return _built(place, "openvino.onnx", "openvino", "float32")


def tensorrt_rtx(place: Place) -> str:
    """Build and audit; it does not run here."""
    return _built(place, "trt.onnx", "tensorrt-rtx", "float16")


def float_openvino(place: Place) -> str:
    """Build the float network, its weights read from beside the graph."""
    return _built(place, "float.onnx", "openvino", "float32")


def closeness(place: Place) -> str:
    """Compare the engine with fake-quantized PyTorch, one image at one step."""
    model, made = place.model, load_plan(place.file("plan.safetensors"))
    baked = json.loads(place.file("openvino.json").read_text())
    data, visited = _noise(model), timesteps(SPEC, model.schedule.num_train)
    with engines.open_engine(place.file("openvino.plan")) as engine:
        result = parity.compare(
            fake_quantized(model.network, made),
            [name for name in made.layers if name not in baked],
            step_denoiser(engine, visited),
            data.take(torch.tensor([0])),
            parity.TOLERANCES["openvino"],
            images=1,
        )
    sqnr, resolution = result.sqnr_db[0], result.resolution_db[0]
    verdict = "passed" if result.passed else "failed"
    return f"SQNR {sqnr:.1f} dB, the network's resolution {resolution:.1f} dB: {verdict}"


STAGES: dict[str, tuple[str, Callable[[Place], str]]] = {
    "plan": ("weights rounded to nearest", plan),
    "float-graph": ("float ONNX", float_graph),
    "openvino-graph": ("Q/DQ for OpenVINO", openvino_graph),
    "openvino": ("OpenVINO engine", openvino),
    "closeness": ("parity of the OpenVINO engine", closeness),
    "tensorrt-graph": ("Q/DQ for TensorRT", tensorrt_graph),
    "tensorrt-rtx": ("TensorRT-RTX engine", tensorrt_rtx),
    "float-openvino": ("OpenVINO engine of the float ONNX", float_openvino),
    "nearest": ("calibration, rounding to nearest", nearest),
    "learned": ("calibration, rounding learned block by block", learned),
}


def main(
    model: ModelName = "sd15",
    width: Annotated[int, typer.Option(help="Channels of the first level; 0 for the model's own.")] = 0,
    stages: Annotated[str, typer.Option(help="Names, with commas between them; all if not given.")] = ",".join(STAGES),
    folder: Folder = Path("bench-large"),
    out: Out = None,
    job: Job = None,
) -> None:
    """Run the stages one after another and write the page."""
    place = Place(model, width, folder)
    if job is not None:
        print(STAGES[job][1](place))
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--model", model, "--width", str(width), "--folder", str(folder)]
    for name in stages.split(","):
        path = place.file(f"stage-{name}.json")
        if not path.exists():
            row = measured([sys.executable, __file__, *options, "--job", name])
            path.write_text(json.dumps(row))
            print(name, row, flush=True)
    rows = [
        (title, f"{row['seconds']:.0f}", f"{row['cpu']:.0f}", f"{row['peak'] / 2**30:.1f}", row["said"])
        for name, (title, _) in STAGES.items()
        if place.file(f"stage-{name}.json").exists()
        for row in (json.loads(place.file(f"stage-{name}.json").read_text()),)
    ]
    write_markdown([*_head(place), *markdown_table(HEAD, rows)], out)


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command in a session of its own; return what it said last, and its seconds and bytes at the peak.

    The peak is of all its processes together: the largest sum that was seen, or, if that is more, the largest of one.
    """
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        while child.poll() is None:
            now, most = _memory(child.pid)
            peak = max(peak, now, most)
            time.sleep(EVERY)
        said = child.stdout.read().strip().splitlines() if child.stdout else []
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"said": said[-1], "seconds": time.perf_counter() - started, "cpu": cpu, "peak": peak}


def _memory(session: int) -> tuple[int, int]:
    """Return the bytes that the session's processes hold now, all together, and the most that one of them ever held."""
    now, most = 0, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) != session:
                continue
            lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        except (OSError, ValueError):  # it has ended
            continue
        now += 1024 * int(lines.get("VmRSS", "0").split()[0])
        most = max(most, 1024 * int(lines.get("VmHWM", "0").split()[0]))
    return now, most


def _calibrated(place: Place, config: QuantConfig, name: str) -> str:
    model = place.model
    blocks = 0

    def count(progress: Progress) -> None:
        nonlocal blocks
        if progress.result is not None:
            blocks += 1
            print(progress.name, f"{sum(progress.seconds.values()):.0f} s", file=sys.stderr, flush=True)

    folder = place.file(f"{name}-blocks")
    data, num_train = _noise(model), model.schedule.num_train
    made = calibrate(model.network, data, config, timesteps=num_train, folder=folder, on_progress=count)
    save_plan(made, place.file(f"{name}.safetensors"))
    return f"{_counted(made)}; {blocks} blocks learned"


def _counted(made: QuantPlan) -> str:
    codes = sum(layer.codes.numel() for layer in made.layers.values())
    return f"{len(made.layers)} layers, {codes / 1e6:.1f} M weights in {BITS} bits"


def _noise(model: LoadedModel) -> CalibrationSet:
    """Return Gaussian noise, also for the conditioning, IMAGES samples at each sampling step."""
    generator, count = torch.Generator().manual_seed(0), SPEC.steps * IMAGES
    step = torch.arange(SPEC.steps).repeat_interleave(IMAGES)
    return CalibrationSet(
        x=torch.randn(count, *model.shape, generator=generator),
        t=timesteps(SPEC, model.schedule.num_train)[step],
        step=step,
        cond={
            name: torch.randn(count, *row.shape[1:], generator=generator)
            for name, row in model.condition_inputs.items()
        },
    )


def _quantized(place: Place, profile: str, compute: str) -> str:
    options, made = find_profile(profile), load_plan(place.file("plan.safetensors"))
    schedule = random_model(reduced(MODELS[place.name])).schedule  # without the weights
    graph = ir.load(place.file("float.onnx"))  # its weights are mapped, not read
    step = make_step(graph, schedule, SPEC)
    insert_qdq(graph, made, options, step)
    if options.openvino_forms:
        rewrite_for_openvino(graph)
    save_onnx(compute_in(graph, compute), place.file(f"{profile}.onnx"))
    place.file(f"{profile}.json").write_text(json.dumps(sorted(step.baked)))
    return _sizes(place, f"{profile}.onnx*")


def _built(place: Place, graph: str, backend: str, compute: str) -> str:
    config = EngineConfig(backend=backend, batch=(1, 1, 1), compute=compute)
    plan = place.file(graph).with_suffix(".plan")
    file = engines.build(place.file(graph), plan, config)
    counts = ", ".join(f"{count} {kind}s in {precision}" for (kind, precision), count in file.audit.counts.items())
    return f"{counts}; {_sizes(place, f'{plan.name}*')}"


def _sizes(place: Place, pattern: str) -> str:
    files = sorted(path for path in place.folder.glob(pattern) if path.suffix != ".json")
    return ", ".join(f"`{path.name}` {path.stat().st_size / 1e6:.1f} MB" for path in files)


def _head(place: Place) -> list[str]:
    model = place.model
    count = sum(p.numel() for p in model.module.parameters())
    inputs = ", ".join(f"{name} {tuple(row.shape[1:])}" for name, row in sorted(model.condition_inputs.items()))
    size = f"width {place.width}" if place.width else "at its own size"
    return [
        f"# {place.name} {size}: memory and time",
        "",
        f"{count / 1e6:.1f} M parameters, {count * 4 / 1e9:.2f} GB in FP32, random weights;",
        f"x {model.shape}, conditioned on {inputs}.",
        f"W4A8, {SPEC.steps * IMAGES} samples of noise, {IMAGES} at each of {SPEC.steps} steps; engines for batch 1.",
        f"{machine()}.",
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}, torch {torch.__version__}.",
        "Peaks are resident memory of all of a stage's processes together, mapped files included.",
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
