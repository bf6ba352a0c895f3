"""Calling an open engine: the checks before every call and the lifetime around them, the same for all backends."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from engines.base import EngineFile
from engines.errors import EngineError

Arrays = dict[str, npt.NDArray[Any]]


class OpenEngine:
    """The part of an `Engine` all backends share: checks before a call, lifetime around it.

    Args:
        file: What was opened.
        run: Takes checked, contiguous inputs and the batch size, returns fresh arrays by output name.
        release: Frees what the runtime holds; dropping the last reference to `run` suffices for most.
    """

    def __init__(
        self, file: EngineFile, run: Callable[[Arrays, int], Arrays], release: Callable[[], None] = lambda: None
    ) -> None:
        self.inputs = file.inputs
        self.outputs = file.outputs
        self._file = file
        self._run: Callable[[Arrays, int], Arrays] | None = run
        self._release = release

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run the network once."""
        if self._run is None:
            raise EngineError(f"The engine {self._file.path} is closed; open it again.")
        batch = check_feeds(self._file, feeds)
        return self._run({name: np.ascontiguousarray(array) for name, array in feeds.items()}, batch)

    def close(self) -> None:
        """Release the runtime's memory."""
        if self._run is not None:
            self._run = None
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
