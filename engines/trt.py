"""Standard TensorRT: builds and runs on a machine with an NVIDIA GPU; an engine fits the GPU it was built on."""

import importlib.util
from pathlib import Path

from engines import nvinfer
from engines.base import Audit, EngineConfig
from engines.driver import cannot_run_on, no_gpu
from engines.files import EngineFile
from engines.graph import OnnxGraph
from engines.runner import OpenEngine


def cannot_build(gpu: int = 0) -> str | None:
    """Return the reason why no engine can be built here, or None; the builder times kernels, so it needs the GPU."""
    # find_spec and no import, which takes seconds: this runs for every backend whenever one is chosen.
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed: pip install tensorrt"
    return no_gpu(gpu) or cannot_run_on(gpu, "tensorrt")


def cannot_run(gpu: int = 0) -> str | None:
    """Return the reason why no engine can run on the GPU of this number, or None."""
    return cannot_run_on(gpu, "tensorrt") or nvinfer.cannot_run("tensorrt", "tensorrt", gpu)


def build(graph: OnnxGraph, path: Path, config: EngineConfig) -> Audit:
    """Build an engine for the GPU of this machine that `config` names."""
    return nvinfer.build("tensorrt", graph, path, config)


def open_file(file: EngineFile) -> OpenEngine:
    """Load the engine on its GPU."""
    import tensorrt  # an optional package, so not at the top

    return nvinfer.open_file(tensorrt, file)
