"""OpenVINO on the CPU: the engine is the ONNX file itself, weights beyond 2 GB beside it, compiled on opening.

The ONNX file is stored, rather than OpenVINO's compiled blob, because it is smaller (INT4 stays packed) and compiling
it takes about a second. Arithmetic outside the INT8 layers is pinned to `compute`, float32 by default: a CPU with BF16
would otherwise use that, and one engine would give different numbers on two machines. Each batch size is compiled
separately, when it is first used: with fixed shapes OpenVINO drops some fifty shape computations, a fifth of a small
U-Net's time.
"""

import functools
import importlib.util
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.audit import UNKNOWN, name_kernels
from engines.base import Audit, Compute, EngineConfig, TensorSpec
from engines.errors import EngineError
from engines.files import EngineFile
from engines.graph import OnnxGraph, initializer_bytes, layer_kinds, tensor_specs
from engines.runner import Arrays, HostRunner, Infer, OpenEngine

_HINTS = {Compute.FLOAT32: "f32", Compute.BFLOAT16: "bf16", Compute.FLOAT16: "f16"}
# OpenVINO's names of element types and of layers, in its runtime graph.
_PRECISIONS = {"u8": "int8", "i8": "int8", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_MATRIX_LAYERS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")


@dataclass(frozen=True, kw_only=True)
class _Compilation:
    """How to compile a model: fixed batch, CPU threads (None: OpenVINO's choice), float type, parallel requests."""

    batch: int
    threads: int | None
    compute: Compute
    streams: int = 1


def missing(gpu: int = 0) -> str | None:
    """Return the reason why OpenVINO cannot be used here, on the CPU, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install openvino"
    return None


def build(graph: OnnxGraph, path: Path, config: EngineConfig) -> Audit:
    """Write the engine, and audit what OpenVINO makes of it on this CPU.

    Raises:
        EngineError: OpenVINO cannot read or compile the model.
    """
    graph.save(path)
    inputs = tensor_specs(graph.model)[0]
    compute = Compute(config.compute or Compute.FLOAT32)
    options = _Compilation(batch=config.batch[1], threads=config.threads, compute=compute)
    compiled = _compile(_read(path), inputs, options)
    layers = layer_kinds(graph.model)
    precisions: dict[str, set[str]] = {}
    held: Counter[str] = Counter()  # bytes of constants after compilation, by OpenVINO's element type
    # The runtime graph has one operation for each kernel, with the ONNX nodes that were merged into it.
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
        note=f"Bytes as stored in the engine. OpenVINO expands INT4 to INT8 when it compiles; it then holds: {memory}.",
    )


def open_file(file: EngineFile) -> OpenEngine:
    """Compile an engine for this CPU: now at the batch it is tuned for, at other batches when they are first used.

    Raises:
        EngineError: OpenVINO cannot read or compile the model.
    """
    model = _read(file.path)

    @functools.cache
    def parts(batch: int) -> list[Infer]:
        streams = _streams(batch, file.threads)
        options = _Compilation(batch=batch // streams, threads=file.threads, compute=file.compute, streams=streams)
        compiled = _compile(model.clone(), file.inputs, options)  # a model can be compiled for one shape only
        return [functools.partial(_infer, compiled.create_infer_request()) for _ in range(streams)]

    parts(file.batch[1])  # so that an engine that cannot be compiled fails on opening and not in the first call
    return OpenEngine(file, HostRunner(file, parts))


def _infer(request: Any, inputs: Arrays, outputs: Arrays) -> None:
    import openvino

    for name, array in {**inputs, **outputs}.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))  # no copy: contiguous, of the same type
    request.start_async()
    request.wait()


def _streams(batch: int, threads: int | None) -> int:
    """Return how many equal parts of a batch run in parallel, each on its share of the threads.

    Cores that work on different images do not wait for each other after every layer.
    """
    return math.gcd(batch, threads or os.cpu_count() or 1)


def _read(engine: Path) -> Any:
    """Read an ONNX file into OpenVINO's model."""
    import openvino

    try:
        return openvino.Core().read_model(engine)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot read this model: {_reason(error)}") from None


def _compile(model: Any, inputs: tuple[TensorSpec, ...], options: _Compilation) -> Any:
    """Compile `model` for one batch; changes its shapes."""
    import openvino

    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[options.compute],
        "NUM_STREAMS": options.streams,
    }
    if options.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = options.threads
    try:
        model.reshape({spec.name: spec.at_batch(options.batch) for spec in inputs})
        return openvino.Core().compile_model(model, "CPU", properties)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot compile this model: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """Return the cause alone: OpenVINO's messages begin with several lines about its own source files."""
    frames = ("Exception from", "Check ", "FrontEnd API", "To facilitate")
    reason = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith(frames))
    return reason.strip()[:400]
