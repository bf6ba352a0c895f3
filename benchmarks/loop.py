"""Time the whole denoising loop: PyTorch, other tools' engines and ours, side by side in one run.

    python benchmarks/loop.py --model ddpm-cifar10 --weights random --steps 50 --batches 4

The contestants take turns, so that a slow minute of the machine slows all of them; medians and ratios are
reported. Weights may be random: time does not depend on them. Every contestant is given the same number of threads and
a static batch. A contestant that needs a package that is not installed (nncf), or a processor that this is not (bf16),
is left out, and the page says so.
"""

import functools
import importlib.util
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler

import engines
import limits
import peers
from command import write_markdown
from engines import EngineConfig
from engines.machine import CPU_FEATURES, inspect_machine
from gaq_export.deploy import session, step_loop
from gaq_export.deploy.record import EngineRecord, GraphKind
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.evaluation.timing import take_turns
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.models.provenance import Provenance
from gaq_export.pipeline import LoadedModel, build_engine, calibrate, load_model, preset
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.report.markdown import machine, markdown_table
from options import ModelName, Out, Weights

Loop = Callable[[], object]
REFERENCE = "PyTorch FP32 (diffusers DDIMPipeline)"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is drawn: `batch` images of `model` in the steps of `spec`; files go to `folder`."""

    model: LoadedModel
    spec: SamplerSpec
    batch: int
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """What every engine of ours is built with."""
        return {"batch": (self.batch, self.batch, self.batch)}


def main(
    model: ModelName = "ddpm-cifar10",
    weights: Weights = "random",
    steps: Annotated[int, typer.Option()] = 50,
    batches: Annotated[str, typer.Option(help="Batch sizes, a table each.")] = "1,4,16",
    rounds: Annotated[int, typer.Option()] = 5,
    only: Annotated[str, typer.Option(help="Words that a contestant's name must have one of.")] = "",
    out: Out = None,
) -> None:
    """Write one table for each batch size: seconds a loop, images a second, and the ratio to PyTorch."""
    loaded, spec = load_model(model, weights), SamplerSpec(steps=steps)
    lines = [
        f"{model}, {steps} DDIM steps, {rounds} rounds in turn, {machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}.",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_onnx(export_float(loaded.network, loaded.shape), folder / "float.onnx")
        macs, peak = limits.macs(loaded.network, loaded.shape), limits.int8_peak(folder)
        lines.append(
            f"{macs / 1e9:.2f} GMAC an image and step; INT8 peak of a 3x3 convolution here {peak / 1e9:.0f} GMAC/s."
        )
        for batch in (int(b) for b in batches.split(",")):
            job = Job(model=loaded, spec=spec, batch=batch, folder=folder / str(batch))
            job.folder.mkdir()
            loops, absent = _contestants(job, folder / "float.onnx", only.split(",") if only else [])
            seconds = take_turns(loops, rounds)
            best = macs * batch * steps / peak
            lines += ["", f"Batch {batch}:", "", *_table(seconds, batch, best), *absent]
            lines += ["", *_costs(job)]
    write_markdown(lines, out)


def _contestants(job: Job, float_graph: Path, words: list[str]) -> tuple[dict[str, Loop], list[str]]:
    """Return the loops by name, and a line for each that cannot be had here."""
    loops: dict[str, Loop] = {}
    absent: list[str] = []
    for name, (needs, make) in CONTESTANTS.items():
        if words and not any(word in name for word in words):
            continue
        if lacks := [need for need in needs if not _has(need)]:
            absent += ["", f"{name}: left out, there is no {', '.join(lacks)} here."]
            continue
        loops[name] = make(job, float_graph)
        print("ready:", name, flush=True)
    return loops, absent


def _has(need: str) -> bool:
    """Tell whether a package is installed, or the processor has a feature."""
    if need in CPU_FEATURES:
        return need in (inspect_machine().features or ())
    return importlib.util.find_spec(need) is not None


def _pytorch(job: Job, float_graph: Path, *, compiled: bool) -> Loop:
    unet = torch.compile(job.model.module) if compiled else job.model.module
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=job.batch, num_inference_steps=job.spec.steps, output_type="np")


def _float_engine(job: Job, float_graph: Path, *, backend: str) -> Loop:
    config = EngineConfig(backend=backend, **job.config)
    record = EngineRecord(provenance=Provenance.of(job.model, job.spec), graph=GraphKind.EPS, bits="float")
    file = engines.build(float_graph, job.folder / f"{backend}-float.plan", config, record.to_json())
    draw = session.draw_with_engine(engines.open_engine(file), file, session.sampling_of(file))
    return lambda: draw(range(job.batch), lambda: None)


def _peer(job: Job, float_graph: Path, *, make: Callable[[peers.Order], peers.Denoise]) -> Loop:
    samples = peers.noise_samples(job.model.shape, job.batch)
    network = job.model.network
    denoise = make(
        peers.Order(network=network, graph=float_graph, folder=job.folder, samples=samples, static=job.batch)
    )
    return lambda: loop.run(denoise, range(job.batch), job.model.sampling(job.spec))


def _ours(job: Job, float_graph: Path, *, backend: str, wbits: int, compute: str = "float32") -> Loop:
    config = EngineConfig(backend=backend, compute=compute, **job.config)
    out = job.folder / f"{backend}-w{wbits}-{compute}.plan"
    built = build_engine(folder=_run(job, wbits), out=out, config=config, sampler=job.spec, model=job.model)
    engine = engines.open_engine(built.file)
    return lambda: step_loop.run(engine, range(job.batch), job.model.sampling(job.spec))


def _run(job: Job, wbits: int) -> Path:
    folder = job.folder.parent / f"run-w{wbits}"
    calibrate(job.model, preset("tiny", CalibrationOptions(wbits=wbits)), folder=folder, sampler=SamplerSpec(steps=4))
    return folder


# Name to the packages and features of the processor it needs, and what makes its loop.
CONTESTANTS: dict[str, tuple[tuple[str, ...], Callable[[Job, Path], Loop]]] = {
    REFERENCE: ((), functools.partial(_pytorch, compiled=False)),
    "PyTorch FP32, torch.compile": ((), functools.partial(_pytorch, compiled=True)),
    "ONNX Runtime FP32": ((), functools.partial(_float_engine, backend="onnxruntime")),
    "ONNX Runtime quantize_static INT8": ((), functools.partial(_peer, make=peers.onnxruntime_static)),
    "OpenVINO FP32": ((), functools.partial(_float_engine, backend="openvino")),
    "OpenVINO + NNCF INT8": (("nncf",), functools.partial(_peer, make=peers.openvino_nncf)),
    "ours, ONNX Runtime W8A8": ((), functools.partial(_ours, backend="onnxruntime", wbits=8)),
    "ours, ONNX Runtime W4A8": ((), functools.partial(_ours, backend="onnxruntime", wbits=4)),
    "ours, OpenVINO W8A8": ((), functools.partial(_ours, backend="openvino", wbits=8)),
    "ours, OpenVINO W4A8": ((), functools.partial(_ours, backend="openvino", wbits=4)),
    "ours, OpenVINO W4A8, bf16 islands": (
        ("avx512_bf16",),
        functools.partial(_ours, backend="openvino", wbits=4, compute="bfloat16"),
    ),
}


def _table(seconds: dict[str, list[float]], batch: int, best: float) -> list[str]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians.get(REFERENCE)
    rows = [
        (
            name,
            f"{median:.2f}",
            f"{batch / median:.2f}",
            "-" if reference is None else f"{reference / median:.2f} x",
            f"{100 * best / median:.0f} %",
            f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}",
        )
        for name, median in medians.items()
    ]
    return markdown_table(("loop", "median s", "images/s", "against PyTorch", "of the INT8 peak", "range s"), rows)


def _costs(job: Job) -> Iterator[str]:
    """Say what our W4A8 step spends its time on, by OpenVINO's own profile."""
    plan = job.folder / "openvino-w4-float32.plan"
    if not plan.exists():
        return
    spent = limits.openvino_profile(onnx.load(plan), job.model.shape, job.batch)
    total = sum(spent.values())
    largest = ", ".join(f"{kind} {100 * s / total:.0f} %" for kind, s in Counter(spent).most_common(5))
    yield f"What a W4A8 step of ours spends its {1e3 * total:.0f} ms on, by OpenVINO's profile: {largest}."


if __name__ == "__main__":
    typer.run(main)
