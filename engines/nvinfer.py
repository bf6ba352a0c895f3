"""What TensorRT and TensorRT-RTX share: build in a child process, audit the layer list, run on an NVIDIA GPU.

The two Python modules have the same API, so the functions here are handed the module (or its name, for the child).
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from engines.audit import read_layer_list
from engines.base import Audit, EngineConfig
from engines.bisect_graph import first_failing_node
from engines.driver import no_gpu
from engines.errors import EngineError
from engines.files import EngineFile
from engines.gpu import GpuRunner
from engines.graph import OnnxGraph, layer_kinds
from engines.nvinfer_child import ERROR_MARK, PARSER
from engines.runner import OpenEngine

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def cannot_run(module: str, package: str) -> str | None:
    """Return why a plan of this TensorRT cannot run here, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {package}"
    if problem := no_gpu():
        return problem
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed: pip install pycuda"
    return None


def build(module: str, graph: OnnxGraph, plan: Path, config: EngineConfig) -> Audit:
    """Build the plan in a child process and audit its layer list.

    Raises:
        EngineError: The parser or builder refused the model, or the child process died; with the node that it could
            not take.
    """
    if config.stripped and (problem := no_gpu()):
        raise EngineError(f"{config.backend} cannot leave out the weights without a GPU: {problem}.")
    tried = _attempt(module, graph, plan, config)
    if tried.status:
        raise EngineError(_what_went_wrong(module, graph, plan, config, tried))
    return read_layer_list(tried.log, layer_kinds(graph.model))


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """How a child process ended: its exit status, TensorRT's log, and what Python said."""

    status: int
    log: str
    stderr: str


def _attempt(module: str, graph: OnnxGraph, plan: Path, config: EngineConfig) -> _Attempt:
    """Build the plan in a child process, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, log = Path(folder, "model.onnx"), Path(folder, "build.log")
        source.write_bytes(graph.model.SerializeToString(deterministic=True))
        job: dict[str, Any] = {"module": module, "onnx": str(source), "plan": str(plan), "log": str(log)}
        job["beside"] = str(graph.folder.resolve() / "model.onnx")
        job |= {"batch": config.batch, "targets": config.targets, "stripped": config.stripped}
        search_path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        child = subprocess.run(
            [sys.executable, "-P", "-m", "engines.nvinfer_child", json.dumps(job)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return _Attempt(status=child.returncode, log=text, stderr=child.stderr)


def _what_went_wrong(module: str, graph: OnnxGraph, plan: Path, config: EngineConfig, tried: _Attempt) -> str:
    """Put a failed build into one line: the node that cannot be taken, and the signal or the last error."""
    errors = [line.removeprefix(ERROR_MARK) for line in tried.log.splitlines() if line.startswith(ERROR_MARK)]
    said = (errors or tried.stderr.strip().splitlines() or ["nothing"])[-1].strip("- ")[:400]
    if tried.status < 0:
        what = f"{config.backend}: the builder crashed ({signal.Signals(-tried.status).name})"
    else:
        what = f"{config.backend} cannot build this model: {said}"
    if PARSER in tried.log or not tried.log:  # the parser names its node; without a log there was no builder
        return what
    with tempfile.TemporaryDirectory(dir=plan.parent, prefix=".bisect.") as folder:
        node = first_failing_node(
            graph.model,
            lambda part: _attempt(module, replace(graph, model=part), Path(folder, "plan"), config).status == 0,
        )
    hint = " Its scale is computed; TensorRT wants a constant." if _computed_scale(graph.model, node) else ""
    return f"{what} (the graph builds up to node {node.name!r}, {node.op_type}, and not with it).{hint}"


def _computed_scale(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Tell whether a quantizer right before `node`, or `node` itself, has a scale that is not a constant."""
    made = {name: producer for producer in model.graph.node for name in producer.output}
    near = [node, *(made[name] for name in node.input if name in made)]
    return any(n.op_type in _QUANTIZERS and n.input[1] in made for n in near)


def open_file(trt: Any, file: EngineFile) -> OpenEngine:
    """Load the plan on the first GPU."""
    return OpenEngine(file, GpuRunner(trt, file, file.path.read_bytes()))
