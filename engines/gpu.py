"""Run a TensorRT engine on an NVIDIA GPU, once or in a loop that never leaves the device.

In a loop the inputs, the outputs, the noise and the number of the iteration stay on the GPU. One iteration (draw the
noise, run the network, copy its outputs to the inputs that they become, count) is captured as a CUDA graph and
replayed; the host waits only for the last one. For small networks the launches would cost more than the arithmetic.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.base import Loop, TensorSpec
from engines.cuda_driver import Address, Cuda
from engines.driver import captured
from engines.errors import EngineError
from engines.files import EngineFile, read_weights
from engines.leftovers import temporary_name
from engines.nvinfer_child import ERROR_MARK, make_logger, make_runtime
from engines.runner import Arrays

_KERNELS = Path(__file__).with_name("philox.ptx")  # `normals` draws as `engines.philox` does, `advance` counts
_THREADS = 256  # in a block


def _store_kernels(kernels: Any, path: Path) -> None:
    """Write compiled kernels for the next time; a folder that cannot be written to only costs compiling them again."""
    temporary = path.with_name(temporary_name(path.parent, path.name))
    with suppress(OSError):
        temporary.write_bytes(kernels)
        os.replace(temporary, path)


@dataclass(frozen=True, kw_only=True)
class _LoopMemory:
    """What a loop needs on the device: the seeds (N,) by input, the iteration's number (1,)."""

    seeds: Mapping[str, Address]
    iteration: Address


class GpuRunner:
    """An `engines.runner.Runner`: a deserialized engine with device buffers for the largest batch.

    It uses the device's primary context, made current only during a call, so that it can share the process with other
    users of the GPU (PyTorch, for one).

    Args:
        trt: The TensorRT module, `tensorrt` or `tensorrt_rtx`.
        cuda: The GPU; the runner closes it.
        file: The engine that is opened.
        serialized: Its bytes.

    Raises:
        EngineError: The engine does not fit this GPU or this version of TensorRT, or there is too little memory.
    """

    def __init__(self, trt: Any, cuda: Cuda, file: EngineFile, serialized: bytes) -> None:
        self._cuda = cuda
        self._file = file
        self._inputs = {spec.name: spec for spec in file.inputs}
        self._kernels_path = file.path.with_name(f"{file.path.name}.kernels")
        try:
            with cuda.current():
                self._load(trt, serialized)
                self._allocate_all()
        except BaseException:
            self._release()
            raise

    def _load(self, trt: Any, serialized: bytes) -> None:
        """Make the engine and its execution context."""
        log = StringIO()
        self._runtime = make_runtime(trt, make_logger(trt, log), self._file.portable)
        self._engine = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            errors = [line for line in log.getvalue().splitlines() if line.startswith(ERROR_MARK)]
            reason = errors[-1].removeprefix(ERROR_MARK) if errors else "no reason given"
            raise EngineError(f"{self._file.backend} cannot load {self._file.path} on this GPU: {reason}")
        self._refit(trt, log)
        self._kernels, self._context = self._make_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _allocate_all(self) -> None:
        """Allocate the memory of the largest batch, once: an allocation inside a capture is an error."""
        self._stream = self._cuda.make_stream()
        self._set_shapes(self._file.batch[2])
        largest = int(self._engine.device_memory_size_v2)
        size = max(256, largest, int(self._context.update_device_memory_size_for_shapes()))
        self._context.set_device_memory(self._cuda.allocate(size), size)
        self._buffers = {spec.name: self._allocate(spec) for spec in (*self._file.inputs, *self._file.outputs)}

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Copy the inputs to the GPU, run the network once, copy the outputs back."""
        with self._cuda.current():
            self._upload(feeds, batch)
            self._enqueue(batch)
            return self._download()

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Capture one iteration, replay it `loop.count` times, copy the last outputs back."""
        with self._cuda.current():
            first = np.full(1, loop.first, np.int64)
            rows = {name: np.array([seed % 2**64 for seed in seeds], np.uint64) for name, seeds in loop.noise.items()}
            memory = _LoopMemory(
                seeds={name: self._to_device(row) for name, row in rows.items()},
                iteration=self._to_device(first),
            )
            once = self._iteration(batch, loop, memory)
            self._upload(feeds, batch)
            once()  # kernels compiled or memory allocated on first use must not fall into the capture
            self._cuda.synchronize(self._stream)
            self._upload(feeds, batch)  # the trial run has overwritten the inputs and the counter
            self._cuda.upload(memory.iteration, first)
            capturable = getattr(self._context, "is_stream_capturable", lambda stream: True)
            graph = captured(self._stream, once) if capturable(self._stream) else nullcontext(once)
            with graph as replay:
                for i in range(loop.count):
                    loop.on_step(loop.first + i)
                    replay()
                results = self._download()
            for allocation in (*memory.seeds.values(), memory.iteration):
                self._cuda.free(allocation)
            return results

    def _iteration(self, batch: int, loop: Loop, memory: _LoopMemory) -> Callable[[], None]:
        """Return a function that puts one iteration on the stream."""
        kernels, iteration = self._noise_kernels, memory.iteration

        def once() -> None:
            for name, row in memory.seeds.items():
                count = int(np.prod(self._inputs[name].shape[1:]))  # type: ignore[arg-type]
                blocks = -(-batch * ((count + 1) // 2) // _THREADS)  # a thread draws two numbers; rounded up
                arguments = (self._buffers[name], row, iteration, batch, count)
                self._cuda.launch(kernels, "normals", arguments, (blocks, _THREADS), self._stream)
            self._enqueue(batch)
            for output, name in loop.feedback.items():
                spec = self._inputs[name]
                size = int(np.prod(spec.at_batch(batch))) * np.dtype(spec.dtype).itemsize
                self._cuda.copy(self._buffers[name], self._buffers[output], size, self._stream)
            # The counter is on the device too: a captured graph replays the same arguments every time.
            self._cuda.launch(kernels, "advance", (iteration,), (1, 1), self._stream)

        return once

    def free(self) -> None:
        """Store the compiled kernels and free the device memory."""
        if self._kernels is not None:
            with self._cuda.current():
                _store_kernels(self._kernels.serialize(), self._kernels_path)
        self._release()

    def _release(self) -> None:
        with self._cuda.current():
            # In this order, the execution context before what it was made from; after an error some may not exist.
            for name in ("_context", "_kernels", "_engine", "_runtime"):
                vars(self).pop(name, None)
        self._cuda.close()

    @cached_property
    def _noise_kernels(self) -> Any:
        return self._cuda.kernels(_KERNELS)

    def _refit(self, trt: Any, log: StringIO) -> None:
        """Put the weights into a stripped engine."""
        weights = read_weights(self._file)
        if weights is None:
            return
        refitter = trt.Refitter(self._engine, make_logger(trt, log))
        if not trt.OnnxParserRefitter(refitter, make_logger(trt, log)).refit_from_bytes(weights) or not (
            refitter.refit_cuda_engine()
        ):
            raise EngineError(f"{self._file.backend} cannot put the weights into {self._file.path}: build it again.")

    def _make_context(self, strategy: Any) -> tuple[Any, Any]:
        """Return (compiled kernels, execution context); no kernels for standard TensorRT, whose engines hold theirs.

        TensorRT-RTX compiles kernels when they are first used, which takes seconds; they are stored beside the engine.
        """
        config: Any = getattr(self._engine, "create_runtime_config", lambda: None)()
        if not hasattr(config, "create_runtime_cache"):
            return None, self._engine.create_execution_context(strategy)
        config.set_execution_context_allocation_strategy(strategy)
        kernels = config.create_runtime_cache()
        stored = self._kernels_path
        if stored.exists() and stored.stat().st_mtime > self._file.path.stat().st_mtime:  # not of an older engine
            kernels.deserialize(stored.read_bytes())  # refuses those of another GPU or version
        config.set_runtime_cache(kernels)
        return kernels, self._engine.create_execution_context(config)

    def _to_device(self, array: npt.NDArray[Any]) -> Address:
        address = self._cuda.allocate(array.nbytes)
        self._cuda.upload(address, array)
        return address

    def _upload(self, feeds: Arrays, batch: int) -> None:
        self._set_shapes(batch)
        for name, array in feeds.items():
            self._cuda.upload(self._buffers[name], array)

    def _enqueue(self, batch: int) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"{self._file.backend} failed to run {self._file.path} at batch {batch}.")

    def _download(self) -> Arrays:
        self._cuda.synchronize(self._stream)
        results: dict[str, npt.NDArray[Any]] = {}
        for spec in self._file.outputs:
            results[spec.name] = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            self._cuda.download(results[spec.name], self._buffers[spec.name])
        return results

    def _set_shapes(self, batch: int) -> None:
        for spec in self._file.inputs:
            if not self._context.set_input_shape(spec.name, spec.at_batch(batch)):
                raise EngineError(f"{self._file.backend} refuses shape {spec.at_batch(batch)} for {spec.name!r}.")

    def _allocate(self, spec: TensorSpec) -> Address:
        """Allocate device memory for a tensor at the shapes now set, and register its address with the context."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        address = self._cuda.allocate(max(1, int(np.prod(shape)) * np.dtype(spec.dtype).itemsize))
        self._context.set_tensor_address(spec.name, address)
        return address
