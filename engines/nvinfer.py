"""What TensorRT and TensorRT-RTX share: build in a child process, audit the layer list, run on an NVIDIA GPU.

The two Python modules have the same API, so the functions here take the module (or its name, for the child process) as
an argument. The package is named after the library that both are built on.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from engines import cuda_driver
from engines.audit import read_layer_list
from engines.base import Audit, EngineConfig
from engines.bisect_graph import first_failing_node
from engines.cuda_driver import open_cuda
from engines.driver import no_gpu
from engines.errors import EngineError
from engines.files import EngineFile
from engines.gpu import GpuRunner
from engines.graph import OnnxGraph, layer_kinds
from engines.leftovers import temporary_name
from engines.nvinfer_child import ERROR_MARK, PARSER, Job
from engines.runner import OpenEngine

# Operators of which TensorRT takes the scale as a constant only.
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def cannot_run(module: str, package: str, gpu: int = 0) -> str | None:
    """Return the reason why an engine of this TensorRT cannot run on the GPU of this number, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {package}"
    return no_gpu(gpu) or cuda_driver.missing()


def build(module: str, graph: OnnxGraph, path: Path, config: EngineConfig) -> Audit:
    """Build an engine in a child process and audit its layer list.

    Raises:
        EngineError: The parser or builder refused the model, or the child process died; the message names the node.
    """
    if config.stripped and (problem := no_gpu(config.gpu)):
        raise EngineError(f"{config.backend} cannot leave out the weights without a GPU: {problem}.")
    attempt = _attempt(module, graph, path, config)
    if attempt.status:
        reason = _reason(config.backend, attempt)
        # The parser names its node; without a log there was no builder whose node could be searched for.
        named = PARSER in attempt.log or not attempt.log
        raise EngineError(reason if named else f"{reason} {_failing_node(module, graph, path, config)}")
    return read_layer_list(attempt.log, layer_kinds(graph.model))


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """How a child process ended: its exit status (-n for signal n), TensorRT's log, and Python's error output."""

    status: int
    log: str
    stderr: str


def _attempt(module: str, graph: OnnxGraph, path: Path, config: EngineConfig) -> _Attempt:
    """Build an engine in a child process and return how that ended, well or not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        log = Path(folder, "build.log")
        # The model in memory and not the user's file: it has the node names that the audit looks for.
        source.write_bytes(graph.model.SerializeToString(deterministic=True))
        job = Job(
            module=module,
            onnx=str(source),
            beside=str(graph.folder.resolve() / "model.onnx"),
            engine=str(path),
            log=str(log),
            batch=config.batch,
            targets=config.targets,
            stripped=config.stripped,
            portable=config.portable,
        )
        # -P and this path first: the child imports this package, whatever lies in the working directory.
        search_path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        child = subprocess.run(
            [sys.executable, "-P", "-m", "engines.nvinfer_child", json.dumps(asdict(job))],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
                **_only(config.gpu),  # TensorRT builds on the first that it sees
            },
            capture_output=True,
            text=True,
            errors="replace",  # a crash may cut a character in two
            check=False,
        )
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return _Attempt(status=child.returncode, log=text, stderr=child.stderr)


def _only(gpu: int) -> dict[str, str]:
    """Return the environment in which a process sees this GPU first, of those that this one sees."""
    if gpu == 0:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) else str(gpu)}


def _reason(backend: str, attempt: _Attempt) -> str:
    """Put a failed build into one line: the signal that ended it, or the last error."""
    if attempt.status < 0:
        return f"{backend}: the builder crashed ({signal.Signals(-attempt.status).name})"
    errors = [line.removeprefix(ERROR_MARK) for line in attempt.log.splitlines() if line.startswith(ERROR_MARK)]
    last = (errors or attempt.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"{backend} cannot build this model: {last.strip('- ')[:400]}"


def _failing_node(module: str, graph: OnnxGraph, path: Path, config: EngineConfig) -> str:
    """Find the node that the builder cannot take, by building beginnings of the graph, and say it in words."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{temporary_name(path.parent, 'bisect')}.") as folder:
        # Each trial is a build, so this may take minutes; without it a crash would leave the user without a clue.
        trial = Path(folder, "engine")
        node = first_failing_node(
            graph.model,
            lambda part: _attempt(module, replace(graph, model=part), trial, config).status == 0,
        )
    hint = " Its scale is computed; TensorRT wants a constant." if _computed_scale(graph.model, node) else ""
    return f"(the graph builds up to node {node.name!r}, {node.op_type}, and not with it).{hint}"


def _computed_scale(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Return whether a quantizer right before `node`, or `node` itself, has a scale that is not a constant."""
    made = {name: producer for producer in model.graph.node for name in producer.output}
    near = [node, *(made[name] for name in node.input if name in made)]
    return any(n.op_type in _QUANTIZERS and n.input[1] in made for n in near)


def has_float8(graph: OnnxGraph) -> bool:
    """Return whether a graph has weights or scales of FP8, which no GPU before Ada computes with."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.model.graph.initializer)


def open_file(trt: Any, file: EngineFile) -> OpenEngine:
    """Load an engine on its GPU."""
    return OpenEngine(file, GpuRunner(trt, open_cuda(file.gpu), file, file.path.read_bytes()))
