"""TensorRT-RTX: builds on any machine, GPU or not; runs on RTX GPUs, where the kernels are compiled on first use."""

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

from engines import nvinfer
from engines.base import Audit, EngineConfig, Portable
from engines.driver import cannot_run_on
from engines.errors import EngineError, EngineWarning
from engines.files import EngineFile
from engines.graph import OnnxGraph
from engines.runner import OpenEngine

# What TensorRT-RTX 1.7 can build for. The builder only logs a target it does not know, and goes on without it.
FLOAT8_TARGETS = ("sm89", "sm120", "sm121")
PORTABLE_TARGETS = ("sm80", "sm86", *FLOAT8_TARGETS)  # Ampere and later; Turing has to be built for alone
TARGETS = ("sm75", *PORTABLE_TARGETS)


def cannot_build(gpu: int = 0) -> str | None:
    """Return the reason why no engine can be built here, or None."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return "tensorrt_rtx is not installed: pip install tensorrt-rtx"
    return None


def cannot_run(gpu: int = 0) -> str | None:
    """Return the reason why no engine can run on the GPU of this number, or None."""
    # The GPU first: whoever has one that it leaves out need not install it.
    return cannot_run_on(gpu, "tensorrt-rtx") or nvinfer.cannot_run("tensorrt_rtx", "tensorrt-rtx", gpu)


def build(graph: OnnxGraph, path: Path, config: EngineConfig) -> Audit:
    """Build an engine for `config.targets`; without them for 8.6, 8.9 and 12.0; portable, for all from Ampere on.

    Raises:
        EngineError: A target is unknown, the engine is to be portable in a way that there is not, or the build failed.

    Warns with an `EngineWarning` if TensorRT-RTX does not run on the GPU of this machine.
    """
    if not config.targets and (problem := cannot_run_on(config.gpu, "tensorrt-rtx")):
        warnings.warn(f"{problem} here. The engine is for another machine", EngineWarning, stacklevel=3)
    if Portable.VERSION in config.portable:
        raise EngineError("tensorrt-rtx has no engines for other versions of it: build again for each; tensorrt has.")
    if config.portable and config.targets:
        raise EngineError("A portable engine is for all GPUs from Ampere on: leave out the targets, or the other.")
    if unknown := [target for target in config.targets if target not in TARGETS]:
        raise EngineError(f"Unknown tensorrt-rtx targets {unknown}. Choose from {list(TARGETS)}.")
    # A portable engine is for Ampere and later, and Ampere has no FP8.
    old = [target for target in config.targets or ("a portable engine",) if target not in FLOAT8_TARGETS]
    if old and nvinfer.has_float8(graph):
        raise EngineError(f"FP8 needs a later GPU than {old[0]}. Give targets of {list(FLOAT8_TARGETS)} only.")
    targets = PORTABLE_TARGETS if config.portable else config.targets
    return nvinfer.build("tensorrt_rtx", graph, path, replace(config, targets=targets, portable=()))


def open_file(file: EngineFile) -> OpenEngine:
    """Load the engine on its GPU."""
    import tensorrt_rtx

    return nvinfer.open_file(tensorrt_rtx, file)
