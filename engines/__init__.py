"""Engines: an ONNX file in, an engine file and its audit out; an engine file in, a callable network out.

This package knows neither quantization nor diffusion. Its story is three functions: `build`, `load_engine_file`,
`open_engine`.
"""

import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.backends import BACKENDS, Backend, best_backend, find_backend
from engines.base import (
    Audit,
    Compute,
    Engine,
    EngineConfig,
    Kernel,
    LayerKind,
    Loop,
    Optimisation,
    PortabilityCost,
    Portable,
    TensorSpec,
)
from engines.errors import EngineError, EngineWarning
from engines.files import EngineFile, check_files, data_path, files_of, load_engine_file, sha256_of, weights_path
from engines.graph import OnnxGraph, read_onnx, tensor_specs
from engines.leftovers import temporary_name
from engines.machine import cpu_features, other_processor
from engines.runner import check_feeds
from engines.timing import time_calls

__all__ = [
    "BACKENDS",
    "Audit",
    "Backend",
    "Compute",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFile",
    "EngineWarning",
    "Kernel",
    "LayerKind",
    "Loop",
    "Optimisation",
    "PortabilityCost",
    "Portable",
    "TensorSpec",
    "best_backend",
    "build",
    "check_feeds",
    "files_of",
    "find_backend",
    "load_engine_file",
    "open_engine",
    "sha256_of",
    "warn_of_processor",
]


def build(
    onnx_path: str | Path, engine_path: str | Path, config: EngineConfig, metadata: dict[str, Any] | None = None
) -> EngineFile:
    """Build an engine and its record from an ONNX file; if that fails, the files that were there before stay.

    Args:
        onnx_path: The ONNX file, in the Q/DQ profile that the backend takes.
        engine_path: Where the engine goes; its record goes to `<engine_path>.json`.
        config: Backend, batch sizes and options.
        metadata: Any JSON object, stored in the record.

    Raises:
        EngineError: The backend is unknown or not installed, or it cannot build this model.
    """
    backend = find_backend(config.backend)
    _check_config(backend, config)
    compute = backend.compute(config.compute)
    metadata = _json_copy(metadata or {})
    graph = _read_graph(onnx_path, config)
    inputs, outputs = tensor_specs(graph.model)  # before the build: it refuses what no backend takes
    path = Path(engine_path)
    try:
        built = _build_in_place(backend, graph, path, replace(config, compute=compute))
    except OSError as error:  # no room, or no permission
        raise EngineError(f"Cannot write {path}: {error.strerror}. Choose a folder with room for it.") from error
    file = EngineFile(
        path=path,
        backend=backend.name,
        inputs=inputs,
        outputs=outputs,
        batch=config.batch,
        sha256=built.sha256,
        audit=built.audit,
        build_seconds=built.seconds,
        metadata=metadata,
        targets=config.targets,
        portable=tuple(map(Portable, config.portable)),
        threads=config.threads,
        optimisation=config.optimisation,
        compute=compute,
        weights=built.weights,
        data=built.data,
        processor=None if backend.on_gpu else cpu_features(),
        gpu=config.gpu,
    )
    if config.portable:
        cost = _cost_of_portability(backend, graph, file, replace(config, compute=compute))
        file = replace(file, audit=replace(file.audit, portability=cost))
    # The record comes last: if a build is cut short, an old record no longer matches the checksums, and none is none.
    file.save()
    return file


def open_engine(source: str | Path | EngineFile, *, gpu: int | None = None) -> Engine:
    """Open an engine file as a callable engine; use it in a `with` statement.

    Warns with an `EngineWarning` if a CPU engine was built on a processor with other features.

    Args:
        source: The file.
        gpu: Number of the GPU, from 0, for engines of GPUs; that of `source` if None, which is 0 by default.

    Raises:
        EngineError: The file is damaged, its backend is unknown, or that backend cannot run here, on that GPU.
    """
    file = source if isinstance(source, EngineFile) else load_engine_file(source)
    file = file if gpu is None else replace(file, gpu=gpu)
    backend = find_backend(file.backend)
    if reason := backend.can_run(file.gpu):
        raise EngineError(f"{file.path} was built for {backend.name}, which cannot run here: {reason}")
    check_files(file)  # also if the caller loaded the record a while ago
    warn_of_processor(file)
    return backend.open(file)


def warn_of_processor(file: EngineFile) -> None:
    """Warn if a CPU engine was built on a processor with other features than this one."""
    if difference := other_processor(file.processor):
        # Without the engine's name: several engines of one build are opened together, and one line is enough.
        warnings.warn(
            f"the engine was built on another processor: this one {difference}. Pictures may differ in their last "
            "digits, and times; build the engine again here for the figures of this machine",
            EngineWarning,
            stacklevel=3,
        )


def _read_graph(onnx_path: str | Path, config: EngineConfig) -> OnnxGraph:
    graph = read_onnx(onnx_path)
    if config.stripped and graph.apart:
        raise EngineError(f"{onnx_path} has weights in other files; only those inside it can be left out of an engine.")
    return graph


def _json_copy(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata as it will be read back from the record, so that a fresh engine equals a loaded one."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EngineError(f"The metadata must hold JSON values only: {error}.") from None
    return copy


def _check_config(backend: Backend, config: EngineConfig) -> None:
    if reason := backend.can_build(config.gpu):
        raise EngineError(f"{backend.name} cannot build here: {reason}")
    # Refused and not ignored: an engine for the wrong GPU, or of the wrong size, would be noticed much later.
    if config.targets and backend.name != "tensorrt-rtx":
        raise EngineError(f"Found targets {list(config.targets)} for {backend.name}; only tensorrt-rtx takes targets.")
    if config.stripped and backend.profile != "trt":
        raise EngineError(f"{backend.name} keeps the weights in the engine; only tensorrt and tensorrt-rtx strip them.")
    if config.portable and backend.profile != "trt":
        kinds = ", ".join(config.portable)
        raise EngineError(f"{backend.name} has no portable engines ({kinds}); only tensorrt and tensorrt-rtx have.")


@dataclass(frozen=True, kw_only=True)
class _Built:
    """What a build gave: audit, duration, and the SHA-256 of each file that there is."""

    audit: Audit
    seconds: float
    sha256: str
    weights: str | None
    data: str | None


def _build_in_place(backend: Backend, graph: OnnxGraph, path: Path, config: EngineConfig) -> _Built:
    """Build in a temporary folder beside `path`, then move the files to their places.

    A folder on the same file system makes every move atomic, so that a failed build leaves an older engine whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{temporary_name(path.parent, path.name)}.") as folder:
        started = time.perf_counter()
        temporary = Path(folder, path.name)  # the same name, because an ONNX graph names the file of its weights
        audit = backend.build(graph, temporary, config)
        seconds = time.perf_counter() - started
        if config.stripped:
            graph.save(weights_path(temporary))
        built = _Built(
            audit=audit,
            seconds=seconds,
            sha256=sha256_of(temporary),
            weights=_sha256_if_there(weights_path(temporary)),
            data=_sha256_if_there(data_path(temporary)),
        )
        # In this order the engine never appears without its weights.
        for source, target in zip(files_of(temporary), files_of(path), strict=True):
            if source.exists():
                os.replace(source, target)
    if built.data is None:
        data_path(path).unlink(missing_ok=True)  # left by the engine that was here before
    return built


def _cost_of_portability(backend: Backend, graph: OnnxGraph, file: EngineFile, config: EngineConfig) -> PortabilityCost:
    """Build the engine once more, not portable, and compare the two."""
    folder = file.path.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{temporary_name(folder, file.path.name)}.") as scratch:
        plain = replace(file, path=Path(scratch, file.path.name), portable=())
        backend.build(graph, plain.path, replace(config, portable=()))
        if config.stripped:
            graph.save(weights_path(plain.path))
        cost = PortabilityCost(bytes=file.path.stat().st_size, plain_bytes=plain.path.stat().st_size)
        if backend.can_run(config.gpu):
            return cost
        with backend.open(file) as portable, backend.open(plain) as other:
            seconds = time_calls({"portable": portable, "plain": other}, config.batch[1])
        return replace(cost, seconds=seconds["portable"], plain_seconds=seconds["plain"])


def _sha256_if_there(path: Path) -> str | None:
    return sha256_of(path) if path.exists() else None
