"""Calling an open engine, once or in a loop: the part that is the same for all backends.

In: NumPy arrays by input name. Out: arrays by output name, after the checks that make a mistake a message instead of a
crash inside a runtime. A loop runs the network on its own outputs: arrays are allocated once, and the output of one
iteration becomes the input of the next by swapping the two.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from engines import philox
from engines.base import Loop
from engines.errors import EngineError
from engines.files import EngineFile

Arrays = dict[str, npt.NDArray[Any]]
Infer = Callable[[Arrays, Arrays], None]  # (inputs, outputs): reads contiguous inputs, writes into the outputs


class Runner(Protocol):
    """An engine loaded by a backend. Its inputs are checked and contiguous; `batch` is their batch size."""

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""

    def free(self) -> None:
        """Release the runtime's memory."""


class HostRunner:
    """A `Runner` for a runtime that works in the host's memory.

    A batch may be cut into equal parts that run in parallel. Each part goes through the whole loop without waiting for
    the others between iterations.

    Args:
        file: The engine that is opened.
        parts: Returns, for a batch size, one function for each part of such a batch, which runs the network on it.
    """

    def __init__(self, file: EngineFile, parts: Callable[[int], Sequence[Infer]]) -> None:
        self._file = file
        self._parts = parts

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""

        def once(infer: Infer, inputs: Arrays, rows: slice) -> Arrays:
            outputs = self._outputs(rows)
            infer(inputs, outputs)
            return outputs

        return self._in_parallel(once, feeds, batch)

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""
        stopped = threading.Event()  # set if another part fails

        def repeat(infer: Infer, feeds: Arrays, rows: slice) -> Arrays:
            inputs = {name: array.copy() for name, array in feeds.items()}
            outputs = self._outputs(rows)
            for i in range(loop.count):
                if i:  # the old input is what the next output overwrites
                    for output, name in loop.feedback.items():
                        inputs[name], outputs[output] = outputs[output], inputs[name]
                for name, seeds in loop.noise.items():
                    inputs[name][:] = philox.normals(seeds[rows], loop.first + i + 1, inputs[name].shape[1:])
                if rows.start == 0:  # one of the parts reports for all
                    loop.on_step(loop.first + i)
                infer(inputs, outputs)
                if stopped.is_set():
                    break
            return outputs

        return self._in_parallel(repeat, feeds, batch, stopped)

    def free(self) -> None:
        """Nothing to do: the runtime's memory is freed with the last reference to this object."""

    def _outputs(self, rows: slice) -> Arrays:
        return {spec.name: np.empty(spec.at_batch(rows.stop - rows.start), spec.dtype) for spec in self._file.outputs}

    def _in_parallel(
        self,
        work: Callable[[Infer, Arrays, slice], Arrays],
        feeds: Arrays,
        batch: int,
        stopped: threading.Event | None = None,
    ) -> Arrays:
        """Call work(infer, feeds, rows) for each part of the batch, and concatenate their outputs.

        If one of them fails, or the user interrupts, `stopped` is set so that the others end early.
        """
        parts = self._parts(batch)
        rows = [slice(batch * i // len(parts), batch * (i + 1) // len(parts)) for i in range(len(parts))]
        # Tensors without a batch dimension (the number of the step) go to every part as they are.
        shared = {spec.name for spec in (*self._file.inputs, *self._file.outputs) if None not in spec.shape}

        def cut(rows: slice) -> Arrays:
            return {name: array if name in shared else array[rows] for name, array in feeds.items()}

        if len(parts) == 1:
            return work(parts[0], feeds, rows[0])
        # Threads suffice: the runtime releases Python's lock while it computes.
        with ThreadPoolExecutor(len(parts)) as pool:
            futures = [pool.submit(work, infer, cut(part), part) for infer, part in zip(parts, rows, strict=True)]
            try:
                results = [future.result() for future in futures]
            except BaseException:  # KeyboardInterrupt too, since the pool waits for its threads
                if stopped is not None:
                    stopped.set()
                raise
        return {
            name: results[0][name] if name in shared else np.concatenate([outputs[name] for outputs in results])
            for name in results[0]
        }


class OpenEngine:
    """The `Engine` of every backend: checks before a call, and a runner that is freed on closing.

    Args:
        file: The engine that is opened.
        runner: What runs it.
    """

    def __init__(self, file: EngineFile, runner: Runner) -> None:
        self.inputs = file.inputs
        self.outputs = file.outputs
        self._file = file
        self._runner: Runner | None = runner

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run the network once."""
        runner = self._open()
        batch = check_feeds(self._file, feeds)
        return runner.run(_contiguous(feeds), batch)

    def loop(self, feeds: Mapping[str, npt.NDArray[Any]], loop: Loop) -> Arrays:
        """Run the network `loop.count` times on its own outputs."""
        runner = self._open()
        # An input that receives noise may be missing from `feeds`: it is zeros until the first draw overwrites it.
        drawn = [spec for spec in self.inputs if spec.name in loop.noise and spec.name not in feeds]
        zeros = {spec.name: np.zeros(spec.at_batch(len(loop.noise[spec.name])), spec.dtype) for spec in drawn}
        batch = check_feeds(self._file, {**feeds, **zeros})
        check_loop(self._file, batch, loop)
        return runner.loop(_contiguous({**feeds, **zeros}), batch, loop)

    def close(self) -> None:
        """Release the runtime's memory."""
        if self._runner is not None:
            self._runner.free()
            self._runner = None

    def _open(self) -> Runner:
        if self._runner is None:
            raise EngineError(f"The engine {self._file.path} is closed; open it again.")
        return self._runner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _contiguous(feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return contiguous arrays with canonical dtypes: NumPy has two kinds of int64, of which OpenVINO takes one."""
    return {name: np.ascontiguousarray(array).view(array.dtype.name) for name, array in feeds.items()}


def check_loop(file: EngineFile, batch: int, loop: Loop) -> None:
    """Check that an engine can run a loop.

    Raises:
        EngineError: There are no iterations; or a tensor does not exist, does not fit the one it is fed back to, or has
            not one seed for each row.
    """
    if loop.count < 1:
        raise EngineError(f"Found a loop of {loop.count} iterations; ask for 1 or more.")
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in file.inputs}
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in file.outputs}
    for output, name in loop.feedback.items():
        if output not in outputs or name not in inputs or outputs[output] != inputs[name]:
            raise EngineError(
                f"Output {output!r} {outputs.get(output)} cannot be fed back to input {name!r} {inputs.get(name)}."
            )
    for name, seeds in loop.noise.items():
        if name not in inputs or inputs[name][0] != "float32" or len(seeds) != batch:
            raise EngineError(f"Input {name!r} {inputs.get(name)} cannot take noise of {len(seeds)} seeds at {batch}.")


def check_feeds(file: EngineFile, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    """Check names, dtypes, shapes and batch before a call.

    Returns:
        The batch size (1 for an engine without a dynamic batch).

    Raises:
        EngineError: Anything differs from the engine's inputs, or the batch lies outside its profile.
    """
    expected = [spec.name for spec in file.inputs]
    # The first input with a dynamic dimension decides the batch; the others have to agree with it.
    if sorted(feeds) != sorted(expected):
        raise EngineError(f"Found inputs {sorted(feeds)}, this engine takes {expected}.")
    batch: int | None = None
    for spec in file.inputs:
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            raise EngineError(f"Input {spec.name!r} has dtype {array.dtype.name}, expected {spec.dtype}.")
        if None in spec.shape and array.ndim == len(spec.shape) and batch is None:
            batch = array.shape[spec.shape.index(None)]
        if array.shape != spec.at_batch(1 if batch is None else batch):
            sizes = ", ".join("batch" if size is None else str(size) for size in spec.shape)
            at = "" if batch is None else f" with batch {batch}"
            raise EngineError(f"Input {spec.name!r} has shape {array.shape}, expected ({sizes}){at}.")
    # Of the runtimes only TensorRT would refuse it, and in words of its own.
    if batch is not None and not file.batch[0] <= batch <= file.batch[2]:
        raise EngineError(
            f"Batch {batch} lies outside this engine's profile {file.batch[0]} to {file.batch[2]}; "
            "feed a batch inside it or build the engine with another profile."
        )
    return 1 if batch is None else batch
