"""Engines: an ONNX file in, a plan file and its audit out; a plan file in, a callable network out.

Knows neither quantization nor diffusion. The story is three functions: `build`, `load_engine_file`, `open_engine`.
"""

import difflib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engines import onnx_runtime, openvino_cpu, trt, trt_rtx
from engines.base import Audit, Engine, EngineConfig, Kernel, Loop, TensorSpec
from engines.errors import EngineError
from engines.files import EngineFile, check_files, data_path, files_of, load_engine_file, sha256_of, weights_path
from engines.graph import OnnxGraph, read_onnx, tensor_specs
from engines.runner import check_feeds

__all__ = [
    "BACKENDS",
    "Audit",
    "Backend",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFile",
    "Kernel",
    "Loop",
    "TensorSpec",
    "best_backend",
    "build",
    "check_feeds",
    "files_of",
    "find_backend",
    "load_engine_file",
    "open_engine",
    "sha256_of",
]


@dataclass(frozen=True)
class Backend:
    """One runtime.

    Attributes:
        name: Its key in `BACKENDS`.
        profile: The QDQ profile of the ONNX graph it wants.
        can_build: Returns None, or why it cannot build here and what to install.
        can_run: The same for running.
        computes: What it can do arithmetic in that is not integer, its own choice first.
        typed: Does arithmetic in the types that the graph says, so that another `compute` is another graph.
        build: Writes the plan file and returns its audit.
        open: Makes a callable engine of a plan file.
    """

    name: str
    profile: str
    can_build: Callable[[], str | None]
    can_run: Callable[[], str | None]
    computes: tuple[str, ...]
    typed: bool
    build: Callable[[OnnxGraph, Path, EngineConfig], Audit]
    open: Callable[[EngineFile], Engine]

    def compute(self, asked: str | None) -> str:
        """Return the type of arithmetic to use; raise EngineError if the one asked for cannot be had."""
        if asked is not None and asked not in self.computes:
            raise EngineError(f"{self.name} cannot compute in {asked!r}. Choose one of {list(self.computes)}.")
        return asked or self.computes[0]


_HALVES, _FULL_FIRST = ("float16", "bfloat16", "float32"), ("float32", "bfloat16", "float16")


def _ort(name: str, profile: str, missing: Callable[[], str | None], computes: tuple[str, ...], device: str) -> Backend:
    build, opened = partial(onnx_runtime.build, device=device), partial(onnx_runtime.open_file, device=device)
    return Backend(name, profile, missing, missing, computes, device == "cuda", build, opened)


# In order of preference.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("tensorrt", "trt", trt.cannot_build, trt.cannot_run, _HALVES, True, trt.build, trt.open_file),
        Backend(
            "tensorrt-rtx",
            "trt",
            trt_rtx.cannot_build,
            trt_rtx.cannot_run,
            _HALVES,
            True,
            trt_rtx.build,
            trt_rtx.open_file,
        ),
        Backend(
            "openvino",
            "openvino",
            openvino_cpu.missing,
            openvino_cpu.missing,
            _FULL_FIRST,
            False,
            openvino_cpu.build,
            openvino_cpu.open_file,
        ),
        _ort("onnxruntime", "ort-cpu", onnx_runtime.missing, ("float32",), "cpu"),
        _ort("onnxruntime-cuda", "ort-cuda", onnx_runtime.missing_cuda, ("float16", "float32"), "cuda"),
    )
}


def find_backend(name: str) -> Backend:
    """Look a backend up by name.

    Raises:
        EngineError: There is none of that name; the message lists those there are and the nearest.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise EngineError(f"Unknown backend {name!r}. Choose one of {list(BACKENDS)}.{hint}")
    return BACKENDS[name]


def best_backend() -> str:
    """Return the first backend that can both build and run on this machine.

    Raises:
        EngineError: None can; the message says why for each.
    """
    reasons = {name: backend.can_build() or backend.can_run() for name, backend in BACKENDS.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise EngineError(f"No backend can build and run here ({listed}).")


def build(
    onnx_path: str | Path, plan_path: str | Path, config: EngineConfig, about: dict[str, Any] | None = None
) -> EngineFile:
    """Build a plan file and its record from an ONNX file; on failure whatever was there before stays.

    Args:
        onnx_path: The ONNX file, in the QDQ profile the backend wants.
        plan_path: Where the plan goes; the record goes to `<plan_path>.json`.
        config: Backend and batch profile.
        about: Any JSON object to keep in the record.

    Raises:
        EngineError: The backend is unknown or absent, or it cannot build this model.
    """
    backend = find_backend(config.backend)
    if reason := backend.can_build():
        raise EngineError(f"{backend.name} cannot build here: {reason}")
    if config.targets and backend.name != "tensorrt-rtx":
        raise EngineError(f"Found targets {list(config.targets)} for {backend.name}; only tensorrt-rtx takes targets.")
    if config.stripped and backend.profile != "trt":
        raise EngineError(f"{backend.name} keeps the weights in the plan; only tensorrt and tensorrt-rtx strip them.")
    config = replace(config, compute=backend.compute(config.compute))
    try:
        about = json.loads(json.dumps(about or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EngineError(f"`about` must hold JSON values only: {error}.") from None
    graph = read_onnx(onnx_path)
    if config.stripped and graph.apart:
        raise EngineError(f"{onnx_path} has weights in other files; only those inside it can be left out of a plan.")
    inputs, outputs = tensor_specs(graph.model)
    plan = Path(plan_path)
    plan.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.parent, prefix=f".{plan.name}.") as folder:
        started = time.perf_counter()
        made = Path(folder, plan.name)
        audit = backend.build(graph, made, config)
        seconds = time.perf_counter() - started
        if config.stripped:
            graph.save(weights_path(made))
        sha256, weights, data = (
            sha256_of(path) if path.exists() else None for path in (made, weights_path(made), data_path(made))
        )
        assert sha256 is not None
        for source, target in zip(files_of(made), files_of(plan), strict=True):
            if source.exists():
                os.replace(source, target)
        if data is None:
            data_path(plan).unlink(missing_ok=True)  # of the engine that was here before
    file = EngineFile(
        path=plan,
        backend=backend.name,
        inputs=inputs,
        outputs=outputs,
        batch=config.batch,
        sha256=sha256,
        audit=audit,
        build_seconds=seconds,
        about=about,
        targets=config.targets,
        threads=config.threads,
        optimisation=config.optimisation,
        compute=backend.compute(config.compute),
        weights=weights,
        data=data,
    )
    # Last, so that a build cut short leaves an old or no record, which the checksum or its absence gives away.
    file.save()
    return file


def open_engine(source: str | Path | EngineFile) -> Engine:
    """Open a plan file as a callable engine; use it in a `with` statement.

    Raises:
        EngineError: The plan is damaged, its backend is unknown, or that backend cannot run here.
    """
    file = source if isinstance(source, EngineFile) else load_engine_file(source)
    backend = find_backend(file.backend)
    if reason := backend.can_run():
        raise EngineError(f"{file.path} was built for {backend.name}, which cannot run here: {reason}")
    check_files(file)
    return backend.open(file)
