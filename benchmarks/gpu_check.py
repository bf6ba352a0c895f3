"""Build, check and time every engine that an NVIDIA GPU can run, and say which could not be built.

    make gpu-check

Each engine has its process, since TensorRT and TensorRT-RTX cannot share one, and a crash is a result too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import engines
from command import write_markdown
from engines import EngineConfig, EngineFile
from engines.driver import gpus, no_gpu
from engines.machine import inspect_machine
from gaq_export.deploy import session
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import user_errors
from gaq_export.pipeline import LoadedModel, build_engine, calibrate, export_onnx, load_model, preset
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.report.markdown import markdown_table

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
ROUNDS = 5


def main(
    model: Annotated[str, typer.Option()] = "ddpm-mnist",
    weights: Annotated[str | None, typer.Option(help="As for gaq-export calibrate.")] = None,
    steps: Annotated[int, typer.Option()] = 50,
    batch: Annotated[int, typer.Option()] = 16,
    out: Annotated[Path | None, typer.Option(help="Markdown page; docs/results/gpu-<name>.md by default.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True, help="backend/type of one engine; answers in JSON.")] = None,
    run: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Check all GPU backends here; without a GPU say so."""
    if reason := no_gpu():
        print(f"gpu-check: not run: {reason}")
        return
    loaded, spec = load_model(model, weights), SamplerSpec(steps=steps)
    if one is not None:
        backend, _, compute = one.partition("/")
        print(json.dumps(examine(loaded, spec, run, backend, compute, batch)))
        return
    gpu = gpus()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrate(loaded, preset("tiny", CalibrationOptions(wbits=4)), folder=folder, sampler=spec)
        kinds = [f"{b}/{compute}" for b in GPU_BACKENDS for compute in engines.BACKENDS[b].computes]
        arguments = ["--model", model, "--steps", str(steps), "--batch", str(batch), "--run", str(folder)]
        arguments += ["--weights", weights] if weights else []
        results = {kind: _in_a_process(kind, arguments) for kind in kinds}
    versions = ", ".join(f"{package} {v}" for package, v in inspect_machine().packages.items() if v)
    lines = [
        f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_bytes / 2**30:.0f} GiB, driver for CUDA "
        f"{gpu.cuda}. {versions}.",
        "",
        f"{model} W4A8, {steps} DDIM steps, batch {batch}, medians of {ROUNDS} loops.",
        "",
        *page(results, _pytorch(loaded, spec, batch), batch),
    ]
    write_markdown(lines, out or Path("docs/results") / f"gpu-{gpu.name.lower().replace(' ', '-')}.md")


def _in_a_process(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Return the result of `examine`, or the reason for a failure under "failed"."""
    rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"} if kind.startswith("tensorrt-rtx") else {}
    child = subprocess.run(
        [sys.executable, __file__, "--one", kind, *arguments],
        env={**os.environ, **rtx},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        result: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (child.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        result = {"failed": f"the process ended with {child.returncode}: {last[:300]}"}
    print(kind, result.get("failed", "checked"), flush=True)
    return result


def examine(model: LoadedModel, spec: SamplerSpec, run: Path, backend: str, compute: str, batch: int) -> dict[str, Any]:
    """Build one engine and measure it.

    Returns:
        "build_seconds", "plan_bytes", "parity_db" and "required_db" (at the worst step), "loop_seconds" (of each
        round), "kernel_seconds" (of one loop, by the runtime's profiler; TensorRT only), "memory_bytes",
        "batch_difference" (of an image alone and in a batch), "worst_layers" (TensorRT only); or "failed" alone.
    """
    problems = engines.BACKENDS[backend].can_build(), engines.BACKENDS[backend].can_run()
    if any(problems):
        return {"failed": next(problem for problem in problems if problem)}
    config = EngineConfig(backend=backend, batch=(1, batch, batch), compute=compute)
    with tempfile.TemporaryDirectory() as name:
        try:
            built = build_engine(folder=run, out=Path(name, "unet.plan"), config=config, model=model)
            assert built.parity is not None
            result = {
                "build_seconds": built.file.build_seconds,
                "plan_bytes": built.file.path.stat().st_size,
                "parity_db": built.parity.sqnr_db[built.parity.worst],
                "required_db": built.parity.required_db(built.parity.worst),
                **_loops(built.file, model, spec, batch),
            }
            if backend.startswith("tensorrt"):
                result |= _by_polygraphy(built.file, model, spec, run)
        except user_errors() as error:
            return {"failed": str(error)}
    return result


def _loops(file: EngineFile, model: LoadedModel, spec: SamplerSpec, batch: int) -> dict[str, Any]:
    before = _memory()
    with engines.open_engine(file) as engine:
        draw = session.draw_with_engine(engine, file, session.sampling_of(file))
        together = draw(range(batch), lambda: None)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            draw(range(batch), lambda: None)
            seconds.append(time.perf_counter() - started)
        alone = draw(range(1), lambda: None)
        difference = float((together[:1] - alone).abs().max())
        return {"loop_seconds": seconds, "memory_bytes": _memory() - before, "batch_difference": difference}


def _memory() -> int:
    """Return the bytes of GPU memory in use, by all processes; 0 where no driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    if shutil.which(query[0]) is None:
        return 0
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20


def _by_polygraphy(file: EngineFile, model: LoadedModel, spec: SamplerSpec, run: Path) -> dict[str, Any]:
    """Measure the kernels of one call, and compare layer by layer in float32."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.backend.trt.util import trt

    from layerwise import compare_layers, tensorrt_runner

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.milliseconds: list[float] = []

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            self.milliseconds.append(milliseconds)

    def feeds(batch: int) -> dict[str, Any]:
        x = loop.noise(range(batch), 0, model.shape).numpy()
        return {"x": x, "step": np.zeros(1, np.int64)}

    times, profiler = [], Profiler()
    with TrtRunner(EngineFromBytes(BytesFromPath(str(file.path)))) as runner:
        runner.infer(feeds(file.batch[2]))
        runner.context.profiler = profiler
        for _ in range(ROUNDS):
            profiler.milliseconds.clear()
            runner.infer(feeds(file.batch[2]))
            times.append(sum(profiler.milliseconds) / 1e3)
    graph = export_onnx("trt", folder=run, model=model, out=file.path.with_name("layers.onnx")).path
    layers = compare_layers(graph, feeds(1), tensorrt_runner)
    worst = sorted(layers.items(), key=lambda item: item[1])[:3]
    return {"kernel_seconds": statistics.median(times) * spec.steps, "worst_layers": dict(worst)}


def _pytorch(model: LoadedModel, spec: SamplerSpec, batch: int) -> tuple[str, float]:
    """Return where PyTorch runs here, and the median seconds of its FP32 loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, seconds = model.network.to(device), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x.to(device), t.to(device)).cpu()  # type: ignore[no-any-return]

    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        loop.run(denoise, range(batch), model.sampling(spec))
        seconds.append(time.perf_counter() - started)
    model.network.to("cpu")
    return device, statistics.median(seconds[1:])


def page(results: dict[str, dict[str, Any]], pytorch: tuple[str, float], batch: int) -> Iterator[str]:
    """Yield the lines of the table of `examine`'s results, by "backend/type", and of what failed."""
    rows = []
    for kind, one in results.items():
        if "failed" in one:
            continue
        loop = statistics.median(one["loop_seconds"])
        kernels = f"{100 * one['kernel_seconds'] / loop:.0f} %" if "kernel_seconds" in one else "-"
        rows.append(
            (
                kind.replace("/", ", "),
                f"{one['build_seconds']:.1f}",
                f"{one['plan_bytes'] / 1e6:.1f}",
                f"{one['parity_db']:.1f} ({one['required_db']:.1f})",
                f"{1e3 * loop:.1f}",
                f"{batch / loop:.1f}",
                f"{pytorch[1] / loop:.1f} x",
                kernels,
                f"{one['memory_bytes'] / 2**20:.0f}",
                f"{one['batch_difference']:.1e}",
            )
        )
    head = ("engine", "build s", "plan MB", "parity dB (asked)", "loop ms", "images/s", "PyTorch", "kernels", "GPU MiB")
    yield from markdown_table((*head, "alone vs batch"), rows)
    yield ""
    yield (
        f"PyTorch: the FP32 loop on {pytorch[0]}, {1e3 * pytorch[1]:.0f} ms. Kernels: the time in them, one by one, "
        "over the loop's. Alone vs batch: the largest difference of an image drawn alone and in the batch."
    )
    for kind, one in results.items():
        if "failed" in one:
            yield f"\n{kind.replace('/', ', ')}: **not run**, {one['failed']}"
        elif "worst_layers" in one:
            worst = ", ".join(f"{name} {db:.0f} dB" for name, db in one["worst_layers"].items())
            yield f"\n{kind.replace('/', ', ')}: the layers furthest from ONNX Runtime by Polygraphy: {worst}."


if __name__ == "__main__":
    typer.run(main)
