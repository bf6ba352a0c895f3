"""What TensorRT and TensorRT-RTX share: build in a child process, audit the layer list, run on an NVIDIA GPU.

The two Python modules have the same API, so the functions here are handed the module (or its name, for the child).
"""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engines.audit import read_layer_list
from engines.base import Audit, EngineConfig, EngineFile, TensorSpec
from engines.errors import EngineError
from engines.graph import layer_kinds
from engines.nvbuild import ERROR_MARK, make_logger
from engines.running import Arrays, OpenEngine


def no_gpu() -> str | None:
    """Return why no NVIDIA GPU can be used here, or None; asks the driver itself and imports nothing."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver here (libcuda was not found): run on a machine with an NVIDIA GPU"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"no NVIDIA GPU here (the driver answered {status} and lists {count.value} devices)"
    return None


def cannot_run(module: str, package: str) -> str | None:
    """Return why a plan of this TensorRT cannot run here, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {package}"
    if problem := no_gpu():
        return problem
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed: pip install pycuda"
    return None


def build(module: str, model: onnx.ModelProto, plan: Path, config: EngineConfig) -> Audit:
    """Build the plan in a child process and audit its layer list.

    Raises:
        EngineError: The parser or builder refused the model, or the child process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, log = Path(folder, "model.onnx"), Path(folder, "build.log")
        source.write_bytes(model.SerializeToString(deterministic=True))
        job: dict[str, Any] = {"module": module, "onnx": str(source), "plan": str(plan), "log": str(log)}
        job |= {"batch": config.batch, "targets": config.targets}
        search_path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        child = subprocess.run(
            [sys.executable, "-P", "-m", "engines.nvbuild", json.dumps(job)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if child.returncode != 0:
        raise EngineError(_what_went_wrong(config.backend, child, text))
    return read_layer_list(text, layer_kinds(model))


def _what_went_wrong(backend: str, child: subprocess.CompletedProcess[str], log: str) -> str:
    """Put a failed build into one line: the signal if there was one, and the log's last telling line."""
    lines = log.splitlines()
    errors = [line for line in lines if line.startswith(ERROR_MARK)]
    layers = [line for line in lines if "Parsing node:" in line or "Timing Runner:" in line]
    last = (errors or layers or child.stderr.strip().splitlines() or ["nothing"])[-1]
    last = last.removeprefix(ERROR_MARK).strip("- ")[:400]
    if child.returncode < 0:
        died = signal.Signals(-child.returncode).name
        hint = "One known cause is a quantizer scale that is computed instead of constant."
        return f"{backend}: the builder crashed ({died}); the last it logged: {last}. {hint}"
    return f"{backend} cannot build this model: {last}"


def open_plan(trt: Any, file: EngineFile, plan: bytes) -> OpenEngine:
    """Load the plan on the first GPU."""
    loaded = _LoadedPlan(trt, file, plan)
    return OpenEngine(file, loaded.run, loaded.free)


class _LoadedPlan:
    """A deserialized plan with device buffers for the largest batch.

    Uses the device's primary context, pushed only for the length of a call, so that it can share the process with
    other users of the GPU.
    """

    def __init__(self, trt: Any, file: EngineFile, plan: bytes) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self._cuda, self._file = cuda, file
        self._device = cuda.Device(0).retain_primary_context()
        self._device.push()
        try:
            words = StringIO()
            self._runtime = trt.Runtime(make_logger(trt, words))
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                errors = [line for line in words.getvalue().splitlines() if line.startswith(ERROR_MARK)]
                reason = errors[-1].removeprefix(ERROR_MARK) if errors else "no reason given"
                raise EngineError(f"{file.backend} cannot load {file.path} on this GPU: {reason}")
            self._context = self._engine.create_execution_context()
            self._stream = cuda.Stream()
            self._set_shapes(file.batch[2])
            self._buffers = {spec.name: self._allocate(spec) for spec in (*file.inputs, *file.outputs)}
        finally:
            cuda.Context.pop()

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Copy the inputs to the GPU, run the network once, copy the outputs back."""
        self._device.push()
        try:
            self._set_shapes(batch)
            for name, array in feeds.items():
                self._cuda.memcpy_htod(self._buffers[name], array)
            if not self._context.execute_async_v3(self._stream.handle):
                raise EngineError(f"{self._file.backend} failed to run {self._file.path} at batch {batch}.")
            self._stream.synchronize()
            results = {}
            for spec in self._file.outputs:
                results[spec.name] = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
                self._cuda.memcpy_dtoh(results[spec.name], self._buffers[spec.name])
            return results
        finally:
            self._cuda.Context.pop()

    def free(self) -> None:
        """Free the device memory; the context before the engine, the engine before the runtime."""
        self._device.push()
        try:
            del self._context, self._engine, self._runtime
            for buffer in self._buffers.values():
                buffer.free()
            del self._stream
        finally:
            self._cuda.Context.pop()

    def _set_shapes(self, batch: int) -> None:
        for spec in self._file.inputs:
            if not self._context.set_input_shape(spec.name, spec.at_batch(batch)):
                raise EngineError(f"{self._file.backend} refuses shape {spec.at_batch(batch)} for {spec.name!r}.")

    def _allocate(self, spec: TensorSpec) -> Any:
        """Give one tensor device memory for the shapes now set, and tell the context where it is."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        buffer = self._cuda.mem_alloc(max(1, int(np.prod(shape)) * np.dtype(spec.dtype).itemsize))
        self._context.set_tensor_address(spec.name, int(buffer))
        return buffer
