"""Run a deserialized TensorRT plan on an NVIDIA GPU, once or in a loop that never leaves the device.

In a loop the inputs, the outputs, the noise and the number of the iteration live on the GPU. One iteration (draw the
noise, run the network, copy its outputs to the inputs they become, count) is captured as a CUDA graph and replayed,
with nothing waited for until the last one is done.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.base import Loop, TensorSpec
from engines.driver import captured
from engines.errors import EngineError
from engines.files import EngineFile, read_weights
from engines.nvinfer_child import ERROR_MARK, make_logger
from engines.runner import Arrays

_KERNELS = Path(__file__).with_name("philox.ptx")
_THREADS = 256


def _keep(kernels: Any, path: Path) -> None:
    """Write compiled kernels for the next time, where that is possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        temporary.write_bytes(kernels)
        os.replace(temporary, path)


class GpuRunner:
    """An `engines.runner.Runner`: a deserialized plan with device buffers for the largest batch.

    Uses the device's primary context, pushed only for the length of a call, so that it can share the process with
    other users of the GPU.

    Args:
        trt: the TensorRT module.
        file: what was opened.
        plan: its bytes.

    Raises:
        EngineError: the plan does not fit this GPU or this version.
    """

    def __init__(self, trt: Any, file: EngineFile, plan: bytes) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self._cuda, self._file = cuda, file
        self._inputs = {spec.name: spec for spec in file.inputs}
        self._kernels_path = file.path.with_name(f"{file.path.name}.kernels")
        self._device = cuda.Device(0).retain_primary_context()
        with self._current():
            words = StringIO()
            self._runtime = trt.Runtime(make_logger(trt, words))
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                errors = [line for line in words.getvalue().splitlines() if line.startswith(ERROR_MARK)]
                reason = errors[-1].removeprefix(ERROR_MARK) if errors else "no reason given"
                raise EngineError(f"{file.backend} cannot load {file.path} on this GPU: {reason}")
            self._refit(trt, words)
            self._kernels, self._context = self._make_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self._stream = cuda.Stream()
            self._set_shapes(file.batch[2])
            most = int(self._engine.device_memory_size_v2)
            size = max(256, most, int(self._context.update_device_memory_size_for_shapes()))
            self._scratch = cuda.mem_alloc(size)
            self._context.set_device_memory(int(self._scratch), size)
            self._buffers = {spec.name: self._allocate(spec) for spec in (*file.inputs, *file.outputs)}

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Copy the inputs to the GPU, run the network once, copy the outputs back."""
        with self._current():
            self._upload(feeds, batch)
            self._enqueue(batch)
            return self._download()

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Capture one iteration, replay it `loop.count` times, copy the last outputs back."""
        with self._current():
            kernels = self._cuda.module_from_file(str(_KERNELS))
            draw, advance = kernels.get_function("normals"), kernels.get_function("advance")
            rows = {name: np.array([seed % 2**64 for seed in seeds], np.uint64) for name, seeds in loop.noise.items()}
            seeds = {name: self._cuda.to_device(row) for name, row in rows.items()}
            first = np.full(1, loop.first, np.int64)
            iteration = self._cuda.to_device(first)

            def once() -> None:
                for name, row in seeds.items():
                    count = int(np.prod(self._inputs[name].shape[1:]))  # type: ignore[arg-type]
                    blocks = -(-batch * ((count + 1) // 2) // _THREADS)
                    arguments = (self._buffers[name], row, iteration, np.uint64(batch), np.uint64(count))
                    draw(*arguments, block=(_THREADS, 1, 1), grid=(blocks, 1), stream=self._stream)
                self._enqueue(batch)
                for output, name in loop.feedback.items():
                    size = (
                        int(np.prod(self._inputs[name].at_batch(batch))) * np.dtype(self._inputs[name].dtype).itemsize
                    )
                    self._cuda.memcpy_dtod_async(self._buffers[name], self._buffers[output], size, self._stream)
                advance(iteration, block=(1, 1, 1), grid=(1, 1), stream=self._stream)

            self._upload(feeds, batch)
            once()  # what is compiled or allocated on first use must not fall into the capture
            self._stream.synchronize()
            self._upload(feeds, batch)
            self._cuda.memcpy_htod(iteration, first)
            capturable = getattr(self._context, "is_stream_capturable", lambda stream: True)
            graph = captured(self._stream.handle, once) if capturable(self._stream.handle) else nullcontext(once)
            with graph as replay:
                for i in range(loop.count):
                    loop.on_step(loop.first + i)
                    replay()
                results = self._download()
            for memory in (*seeds.values(), iteration):
                memory.free()
            return results

    def free(self) -> None:
        """Keep the kernels that were compiled, and free the device memory; the context first, the runtime last."""
        with self._current():
            if self._kernels is not None:
                _keep(self._kernels.serialize(), self._kernels_path)
                del self._kernels
            del self._context, self._engine, self._runtime
            for buffer in (*self._buffers.values(), self._scratch):
                buffer.free()
            del self._stream

    def _refit(self, trt: Any, words: StringIO) -> None:
        """Give a stripped plan its weights."""
        weights = read_weights(self._file)
        if weights is None:
            return
        refitter = trt.Refitter(self._engine, make_logger(trt, words))
        if not trt.OnnxParserRefitter(refitter, make_logger(trt, words)).refit_from_bytes(weights) or not (
            refitter.refit_cuda_engine()
        ):
            raise EngineError(f"{self._file.backend} cannot put the weights into {self._file.path}: build it again.")

    def _make_context(self, strategy: Any) -> tuple[Any, Any]:
        """Return the execution context, and before it the kernels compiled for it (None where plans hold theirs)."""
        config: Any = getattr(self._engine, "create_runtime_config", lambda: None)()
        if not hasattr(config, "create_runtime_cache"):
            return None, self._engine.create_execution_context(strategy)
        config.set_execution_context_allocation_strategy(strategy)
        kernels, kept = config.create_runtime_cache(), self._kernels_path
        if kept.exists() and kept.stat().st_mtime > self._file.path.stat().st_mtime:  # of this plan, not an older one
            kernels.deserialize(kept.read_bytes())  # refuses those of another GPU or version
        config.set_runtime_cache(kernels)
        return kernels, self._engine.create_execution_context(config)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._device.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _upload(self, feeds: Arrays, batch: int) -> None:
        self._set_shapes(batch)
        for name, array in feeds.items():
            self._cuda.memcpy_htod(self._buffers[name], array)

    def _enqueue(self, batch: int) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(f"{self._file.backend} failed to run {self._file.path} at batch {batch}.")

    def _download(self) -> Arrays:
        self._stream.synchronize()
        results: dict[str, npt.NDArray[Any]] = {}
        for spec in self._file.outputs:
            results[spec.name] = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            self._cuda.memcpy_dtoh(results[spec.name], self._buffers[spec.name])
        return results

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
