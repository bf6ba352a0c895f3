"""Standard TensorRT: builds and runs on a machine with an NVIDIA GPU; an engine fits the GPU it was built on."""

import importlib.util
from pathlib import Path

from engines import nvinfer
from engines.base import Audit, EngineConfig, Portable
from engines.driver import cannot_run_on, no_gpu
from engines.errors import EngineError
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
    """Build an engine for the GPU of this machine that `config` names; portable, for all GPUs from Ampere on.

    Raises:
        EngineError: The graph has FP8 and the engine is to run on Ampere too, or the build failed.
    """
    if Portable.GPU in config.portable and nvinfer.has_float8(graph):
        raise EngineError("FP8 needs a later GPU than Ampere, and --portable gpu is for Ampere too: leave one out.")
    return nvinfer.build("tensorrt", graph, path, config)


def open_file(file: EngineFile) -> OpenEngine:
    """Load the engine on its GPU."""
    import tensorrt  # an optional package, so not at the top

    return nvinfer.open_file(tensorrt, file)
