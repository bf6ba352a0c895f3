"""OpenVINO on the CPU: the plan is the ONNX file itself, weights beyond 2 GB beside it, compiled when it is opened.

That file is kept, rather than OpenVINO's own blob, because it is smaller (INT4 stays packed) and compiling it takes
about a second. Arithmetic outside the INT8 layers is pinned to `compute`, float32 by default: a CPU with BF16 would
otherwise use that, and the same plan would give other numbers on another machine. Each batch size is compiled on its
own, when it is first used: with a fixed shape OpenVINO drops some fifty shape computations, a fifth of a small U-Net's
time.
"""

import functools
import importlib.util
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engines.audit import UNKNOWN, name_kernels
from engines.base import Audit, EngineConfig, TensorSpec
from engines.errors import EngineError
from engines.files import EngineFile
from engines.graph import OnnxGraph, initializer_bytes, layer_kinds, tensor_specs
from engines.runner import Arrays, HostRunner, Infer, OpenEngine

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_PRECISIONS = {"u8": "int8", "i8": "int8", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_MATRIX_LAYERS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")


def missing() -> str | None:
    """Return why OpenVINO cannot be used here, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install openvino"
    return None


def build(graph: OnnxGraph, plan: Path, config: EngineConfig) -> Audit:
    """Write the plan and audit what OpenVINO makes of it on this CPU."""
    graph.save(plan)
    inputs = tensor_specs(graph.model)[0]
    compiled = _compile(_read(plan), inputs, config.batch[1], config.threads, str(config.compute))
    layers = layer_kinds(graph.model)
    precisions: dict[str, set[str]] = {}
    held: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        if info["layerType"] == "Const":
            element = op.output(0).element_type
            held[element.get_type_name()] += int(np.prod(op.output(0).shape)) * element.size
        if info["layerType"] not in _MATRIX_LAYERS:
            continue
        for part in info["originalLayersNames"].split(","):  # "node_conv/WithoutBiases,Multiply_7,node_conv"
            name = next((n for n in layers if part == n or part.startswith(n + "/")), None)
            if name:
                precisions.setdefault(name, set()).add(_PRECISIONS.get(info["runtimePrecision"], UNKNOWN))
    memory = ", ".join(f"{dtype} {size}" for dtype, size in sorted(held.items()) if size)
    return Audit(
        kernels=name_kernels(layers, precisions),
        weight_bytes=initializer_bytes(graph.model),
        note=f"Bytes as stored in the plan. OpenVINO expands INT4 to INT8 when it compiles; it then holds: {memory}.",
    )


def open_file(file: EngineFile) -> OpenEngine:
    """Compile the plan for this CPU, at the best batch now and at others when they come."""
    model = _read(file.path)

    @functools.cache
    def parts(batch: int) -> list[Infer]:
        streams = _streams(batch, file.threads)
        compiled = _compile(model.clone(), file.inputs, batch // streams, file.threads, file.compute, streams)
        return [functools.partial(_infer, compiled.create_infer_request()) for _ in range(streams)]

    parts(file.batch[1])
    return OpenEngine(file, HostRunner(file, parts))


def _infer(request: Any, inputs: Arrays, outputs: Arrays) -> None:
    import openvino

    for name, array in {**inputs, **outputs}.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    request.start_async()
    request.wait()


def _streams(batch: int, threads: int | None) -> int:
    """Return into how many equal parts a batch is cut, which run beside each other on a share of the threads.

    Cores that work on images of their own do not wait for each other in every layer.
    """
    return math.gcd(batch, threads or os.cpu_count() or 1)


def _read(plan: Path) -> Any:
    """Return a plan as OpenVINO's model, which may be compiled once."""
    import openvino

    try:
        return openvino.Core().read_model(plan)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot read this model: {_reason(error)}") from None


def _compile(
    model: Any,
    inputs: tuple[TensorSpec, ...],
    batch: int,
    threads: int | None,
    compute: str,
    streams: int = 1,
) -> Any:
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[compute], "NUM_STREAMS": streams}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model.reshape({spec.name: spec.at_batch(batch) for spec in inputs})
        return openvino.Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot compile this model: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """Return what went wrong: messages run over several lines and begin with the places that passed the error on."""
    frames = ("Exception from", "Check ", "FrontEnd API", "To facilitate")
    reason = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith(frames))
    return reason.strip()[:400]
