"""The table of backends: which runtimes there are, what each one takes, and which of them work on this machine.

A backend is a row of functions, not a class of its own: adding one means writing those functions in a module and
naming them here.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from engines import onnx_runtime, openvino_cpu, trt, trt_rtx
from engines.base import Audit, Compute, Engine, EngineConfig
from engines.errors import EngineError
from engines.files import EngineFile
from engines.graph import OnnxGraph


class Check(Protocol):
    """Whether something can be done here, on the GPU of a number if it needs one."""

    def __call__(self, gpu: int = 0, /) -> str | None:
        """Return None if it can, else the reason why not and what to install."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One runtime.

    Attributes:
        name: Its key in `BACKENDS`.
        profile: The Q/DQ profile of the ONNX graph that it takes.
        can_build: Returns None if it can build here, on the GPU of the given number if it needs one, else the reason
            why not and what to install.
        can_run: The same for running.
        computes: Types it can use for the arithmetic that is not integer; the first is the default.
        on_gpu: True if it computes on a GPU, so that the processor's features do not matter.
        typed: True if the types in the graph decide the arithmetic, so that another `compute` needs another graph.
        build: Writes the engine to a path and returns its audit.
        open: Opens an engine.
    """

    name: str
    profile: str
    can_build: Check
    can_run: Check
    computes: tuple[Compute, ...]
    on_gpu: bool
    typed: bool
    build: Callable[[OnnxGraph, Path, EngineConfig], Audit]
    open: Callable[[EngineFile], Engine]

    def compute(self, requested: str | None) -> Compute:
        """Return the type of the arithmetic that is not integer: the requested one, or the default for None.

        Raises:
            EngineError: The backend cannot compute in the requested type.
        """
        if requested is None:
            return self.computes[0]
        if requested not in self.computes:
            choices = [str(compute) for compute in self.computes]
            raise EngineError(f"{self.name} cannot compute in {requested!r}. Choose one of {choices}.")
        return Compute(requested)


# On a GPU 16-bit products are the fast ones. On a CPU float32 is the default, although recent ones have BF16, so that
# an engine gives the same numbers on every machine.
_GPU_COMPUTES = (Compute.FLOAT16, Compute.BFLOAT16, Compute.FLOAT32)
_CPU_COMPUTES = (Compute.FLOAT32, Compute.BFLOAT16, Compute.FLOAT16)

# In order of preference: `best_backend` takes the first that works.
_TABLE = (
    Backend(
        name="tensorrt",
        profile="trt",
        can_build=trt.cannot_build,
        can_run=trt.cannot_run,
        computes=_GPU_COMPUTES,
        on_gpu=True,
        typed=True,
        build=trt.build,
        open=trt.open_file,
    ),
    Backend(
        name="tensorrt-rtx",
        profile="trt",
        can_build=trt_rtx.cannot_build,
        can_run=trt_rtx.cannot_run,
        computes=_GPU_COMPUTES,
        on_gpu=True,
        typed=True,
        build=trt_rtx.build,
        open=trt_rtx.open_file,
    ),
    Backend(
        name="openvino",
        profile="openvino",
        can_build=openvino_cpu.missing,
        can_run=openvino_cpu.missing,
        computes=_CPU_COMPUTES,
        on_gpu=False,
        typed=False,
        build=openvino_cpu.build,
        open=openvino_cpu.open_file,
    ),
    Backend(
        name="onnxruntime",
        profile="ort-cpu",
        can_build=onnx_runtime.missing,
        can_run=onnx_runtime.missing,
        computes=(Compute.FLOAT32,),
        on_gpu=False,
        typed=False,
        build=partial(onnx_runtime.build, device=onnx_runtime.Device.CPU),
        open=partial(onnx_runtime.open_file, device=onnx_runtime.Device.CPU),
    ),
    Backend(
        name="onnxruntime-cuda",
        profile="ort-cuda",
        can_build=onnx_runtime.missing_cuda,
        can_run=onnx_runtime.missing_cuda,
        computes=(Compute.FLOAT16, Compute.FLOAT32),
        on_gpu=True,
        typed=True,
        build=partial(onnx_runtime.build, device=onnx_runtime.Device.CUDA),
        open=partial(onnx_runtime.open_file, device=onnx_runtime.Device.CUDA),
    ),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _TABLE}


def find_backend(name: str) -> Backend:
    """Return the backend called `name`.

    Raises:
        EngineError: There is none of that name; the message lists those there are and the nearest one.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise EngineError(f"Unknown backend {name!r}. Choose one of {list(BACKENDS)}.{hint}")
    return BACKENDS[name]


def best_backend(gpu: int = 0) -> str:
    """Return the name of the first backend that can both build and run on this machine.

    Args:
        gpu: Number of the GPU, for backends that need one.

    Raises:
        EngineError: None can; the message gives the reason for each.
    """
    # Both are required: an engine that is built here to run elsewhere is something to ask for, not a default.
    reasons = {name: backend.can_build(gpu) or backend.can_run(gpu) for name, backend in BACKENDS.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise EngineError(f"No backend can build and run here ({listed}).")
