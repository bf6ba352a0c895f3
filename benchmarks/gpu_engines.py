"""Build, check and time one engine on a GPU, and make the table of all of them.

TensorRT and TensorRT-RTX cannot share a process, so each engine has its own, and a crash is a result too.
"""

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import engines
from engines import EngineConfig, EngineFile
from gaq_export.deploy import session
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.pipeline import build_engine, calibrate, export_onnx, preset
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.report.markdown import markdown_table, plain
from gpu_calibration import on_device
from gpu_records import PYTORCH, Finding, NotRun, Report, Request, attempt

ROUNDS = 5
RUN = "engines"  # run folder of the engines


def report_engine(kind: str, request: Request, report: Report) -> None:
    """Build, check and time one engine, "backend/type", or time PyTorch where the kind is `PYTORCH`.

    Raises:
        NotRun: It cannot be built or run here.
    """
    model, spec = load_model(request.small), SamplerSpec(steps=request.steps)
    if kind == PYTORCH:
        with attempt(kind, report) as facts:
            facts |= _pytorch(on_device(model, request), spec, request.engine_batch)
        return
    backend, _, compute = kind.partition("/")
    problems = engines.BACKENDS[backend].can_build(), engines.BACKENDS[backend].can_run()
    if any(problems):
        raise NotRun(next(problem for problem in problems if problem))
    with attempt(kind, report) as facts:
        run = Path(request.folder, RUN)  # the first engine calibrates, the next ones find the plan
        calibrate(model, preset("tiny", CalibrationOptions(wbits=4)), folder=run, sampler=spec)
        batch = request.engine_batch
        config = EngineConfig(backend=backend, batch=(1, batch, batch), compute=compute)
        # Beside float once for each backend, since that builds another engine.
        facts |= examine(model, spec, run, config, timing=compute == engines.BACKENDS[backend].computes[0])


def examine(model: LoadedModel, spec: SamplerSpec, run: Path, config: EngineConfig, *, timing: bool) -> dict[str, Any]:
    """Build one engine and measure it.

    Returns:
        "build_seconds", "plan_bytes", "parity_db" and "required_db" (at the worst step), "loop_seconds" (of each
        round), "kernel_seconds" (of one loop, by the runtime's profiler; TensorRT only), "memory_bytes",
        "batch_difference" (of an image alone and in a batch), "worst_layers" (TensorRT only),
        "against_float" (a line; with `timing` only).

    Raises:
        EngineError, GaqError: The backend refused, or computes something else.
    """
    with tempfile.TemporaryDirectory() as name:
        built = build_engine(folder=run, out=Path(name, "unet.plan"), config=config, model=model, timing=timing)
        assert built.parity is not None
        result = {
            "build_seconds": built.file.build_seconds,
            "plan_bytes": built.file.path.stat().st_size,
            "parity_db": built.parity.sqnr_db[built.parity.worst],
            "required_db": built.parity.required_db(built.parity.worst),
            **_loops(built.file, config.batch[2]),
        }
        if built.timing is not None:
            result["against_float"] = built.timing.line
        if config.backend.startswith("tensorrt"):
            result |= _by_polygraphy(built.file, model, spec, run)
    return result


def _loops(file: EngineFile, batch: int) -> dict[str, Any]:
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


def _pytorch(model: LoadedModel, spec: SamplerSpec, batch: int) -> dict[str, Any]:
    """Return the seconds of each round of PyTorch's FP32 loop, on the model's device."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        loop.run(model.network, range(batch), model.sampling(spec))
        seconds.append(time.perf_counter() - started)
    return {"device": model.device.place.type, "loop_seconds": seconds[1:]}  # the first warms up


def page(findings: Sequence[Finding], batch: int) -> Iterator[str]:
    """Yield the lines of the table of `report_engine`'s findings, and of what failed."""
    by_kind = {one.part: one for one in findings}
    pytorch = by_kind.pop(PYTORCH, None)
    measured = {kind: one.facts for kind, one in by_kind.items() if one.failed is None}
    head = ("engine", "build s", "plan MB", "parity dB (asked)", "loop ms", "images/s", "PyTorch", "kernels", "GPU MiB")
    base = statistics.median(pytorch.facts["loop_seconds"]) if pytorch and pytorch.failed is None else None
    yield from markdown_table(
        (*head, "alone vs batch"), [_row(kind, facts, base, batch) for kind, facts in measured.items()]
    )
    yield ""
    if pytorch is not None and base is not None:
        yield f"PyTorch: the FP32 loop on {pytorch.facts['device']}, {1e3 * base:.0f} ms."
    yield (
        f"Medians of {ROUNDS} loops at batch {batch}. Kernels: the time in them, one by one, over the loop's. Alone vs "
        "batch: the largest difference of an image drawn alone and in the batch."
    )
    for kind, one in by_kind.items():
        if one.failed is not None:
            yield f"\n{kind.replace('/', ', ')}: **failed**, {plain(one.failed)}"
        if "against_float" in one.facts:
            yield f"\n{kind.replace('/', ', ')}: {one.facts['against_float']}."
        if "worst_layers" in one.facts:
            worst = ", ".join(f"{name} {db:.0f} dB" for name, db in one.facts["worst_layers"].items())
            yield f"\n{kind.replace('/', ', ')}: the layers furthest from ONNX Runtime by Polygraphy: {worst}."


def _row(kind: str, facts: Mapping[str, Any], pytorch: float | None, batch: int) -> tuple[str, ...]:
    loop = statistics.median(facts["loop_seconds"])
    return (
        kind.replace("/", ", "),
        f"{facts['build_seconds']:.1f}",
        f"{facts['plan_bytes'] / 1e6:.1f}",
        f"{facts['parity_db']:.1f} ({facts['required_db']:.1f})",
        f"{1e3 * loop:.1f}",
        f"{batch / loop:.1f}",
        "-" if pytorch is None else f"{pytorch / loop:.1f} x",
        f"{100 * facts['kernel_seconds'] / loop:.0f} %" if "kernel_seconds" in facts else "-",
        f"{facts['memory_bytes'] / 2**20:.0f}",
        f"{facts['batch_difference']:.1e}",
    )
