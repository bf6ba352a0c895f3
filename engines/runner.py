"""Calling an open engine, once or in a loop: what is the same for all backends.

A loop runs the network on its own outputs. Arrays are made once: what an iteration wrote, the next one reads, and two
sets of them change places.
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
Infer = Callable[[Arrays, Arrays], None]  # reads contiguous inputs, writes to the outputs it is given


class Runner(Protocol):
    """What a backend makes of a plan. Inputs are checked and contiguous; `batch` is their batch size."""

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""

    def free(self) -> None:
        """Release what the runtime holds."""


class HostRunner:
    """A `Runner` for a runtime that works in the host's memory.

    A batch may be cut in equal parts that run beside each other. Each goes through a whole loop on its own, so that
    none waits for the others between iterations.

    Args:
        file: What was opened.
        parts: Returns for a batch size what runs the network on each part of such a batch.
    """

    def __init__(self, file: EngineFile, parts: Callable[[int], Sequence[Infer]]) -> None:
        self._file, self._parts = file, parts

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""

        def once(infer: Infer, inputs: Arrays, rows: slice) -> Arrays:
            outputs = self._outputs(rows)
            infer(inputs, outputs)
            return outputs

        return self._beside(once, feeds, batch)

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""
        stopped = threading.Event()

        def repeat(infer: Infer, feeds: Arrays, rows: slice) -> Arrays:
            inputs, outputs = {name: array.copy() for name, array in feeds.items()}, self._outputs(rows)
            for i in range(loop.count):
                if i:
                    for output, name in loop.feedback.items():
                        inputs[name], outputs[output] = outputs[output], inputs[name]
                for name, seeds in loop.noise.items():
                    inputs[name][:] = philox.normals(seeds[rows], loop.first + i + 1, inputs[name].shape[1:])
                if rows.start == 0:
                    loop.on_step(loop.first + i)
                infer(inputs, outputs)
                if stopped.is_set():
                    break
            return outputs

        return self._beside(repeat, feeds, batch, stopped)

    def free(self) -> None:
        """Release what the runtime holds: it goes with the last reference to this."""

    def _outputs(self, rows: slice) -> Arrays:
        return {spec.name: np.empty(spec.at_batch(rows.stop - rows.start), spec.dtype) for spec in self._file.outputs}

    def _beside(
        self,
        work: Callable[[Infer, Arrays, slice], Arrays],
        feeds: Arrays,
        batch: int,
        stopped: threading.Event | None = None,
    ) -> Arrays:
        """Call work(infer, feeds, rows) for each part of the batch, and put what they return together.

        If one of them fails, or the user interrupts, `stopped` is set, and the others end early.
        """
        parts = self._parts(batch)
        rows = [slice(batch * i // len(parts), batch * (i + 1) // len(parts)) for i in range(len(parts))]
        whole = {spec.name for spec in (*self._file.inputs, *self._file.outputs) if None not in spec.shape}

        def cut(rows: slice) -> Arrays:
            return {name: array if name in whole else array[rows] for name, array in feeds.items()}

        if len(parts) == 1:
            return work(parts[0], feeds, rows[0])
        with ThreadPoolExecutor(len(parts)) as pool:
            started = [pool.submit(work, infer, cut(own), own) for infer, own in zip(parts, rows, strict=True)]
            try:
                made = [one.result() for one in started]
            except BaseException:
                if stopped is not None:
                    stopped.set()
                raise
        return {
            name: made[0][name] if name in whole else np.concatenate([outputs[name] for outputs in made])
            for name in made[0]
        }


class OpenEngine:
    """The part of an `Engine` all backends share: checks before a call, lifetime around it.

    Args:
        file: What was opened.
        runner: What the backend made of it.
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
    """Return arrays without gaps, their dtypes NumPy's own: of two kinds of int64, OpenVINO knows one."""
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
    if batch is not None and not file.batch[0] <= batch <= file.batch[2]:
        raise EngineError(
            f"Batch {batch} lies outside this engine's profile {file.batch[0]} to {file.batch[2]}; "
            "feed a batch inside it or build the engine with another profile."
        )
    return 1 if batch is None else batch
