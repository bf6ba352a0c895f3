"""ONNX Runtime on the CPU: the plan is the self-contained ONNX file itself, a session is made when it is opened."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import onnx

from engines.base import Audit, EngineConfig, EngineFile, Kernel
from engines.errors import EngineError
from engines.graph import MATRIX_OPS, initializer_bytes, weight_layers
from engines.running import OpenEngine

_LEVELS = {"basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}
_ERRORS_ONLY = 3


def missing() -> str | None:
    """Return why ONNX Runtime cannot be used here, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install onnxruntime"
    return None


def build(model: onnx.ModelProto, plan: Path, config: EngineConfig) -> Audit:
    """Write the plan and audit the graph ONNX Runtime's optimiser makes of it."""
    plan.write_bytes(model.SerializeToString(deterministic=True))
    with tempfile.TemporaryDirectory() as folder:
        optimised_path = Path(folder, "optimised.onnx")
        _session(plan.read_bytes(), config.threads, config.optimisation, optimised_path)
        optimised = onnx.load(optimised_path)
    # Integer operators that survive in the optimised graph run as such; a float one fed by DequantizeLinear does not.
    kernels = tuple(
        Kernel(name=name, kind=MATRIX_OPS[node.op_type][0], precision=MATRIX_OPS[node.op_type][2])
        for name, node in weight_layers(optimised).items()
    )
    memory = ", ".join(f"{dtype} {size}" for dtype, size in sorted(initializer_bytes(optimised).items()))
    return Audit(
        kernels=kernels,
        weight_bytes=initializer_bytes(model),
        note=f"Bytes as stored in the plan. After ONNX Runtime's optimiser the weights are: {memory}.",
    )


def open_plan(file: EngineFile, plan: bytes) -> OpenEngine:
    """Make a CPU session of the plan."""
    session = _session(plan, file.threads, file.optimisation)
    names = [spec.name for spec in file.outputs]
    return OpenEngine(file, lambda feeds, batch: dict(zip(names, session.run(names, feeds), strict=True)))


def _session(onnx_bytes: bytes, threads: int | None, optimisation: str, optimised: Path | None = None) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimisation])
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    try:
        return onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    except (  # they share no base below Exception
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.InvalidProtobuf,
        failures.NotImplemented,
        failures.RuntimeException,
    ) as error:
        raise EngineError(f"onnxruntime cannot load this model: {str(error).splitlines()[0]}") from None
