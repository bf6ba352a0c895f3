"""One iteration as one CUDA graph: a single launch, where hundreds of small kernels would each wait for Python."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # iterations that run as they are: libraries allocate and choose their kernels in the first ones

Work = Callable[[Sequence[Tensor]], None]
Record = Callable[[Callable[[], None]], Callable[[], None]]  # of some work, what does all of it again at one launch

_log = logging.getLogger(__name__)


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record what `work` launches, without running it, and return what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


class Captured:
    """Work on tensors of fixed shapes that is recorded after a few calls and replayed from then on.

    Where it cannot be recorded it goes on as it is.

    Args:
        work: takes tensors, writes its results to others, which must be the same at every call, and returns nothing. It
            may not wait for the device, and makes no tensor from numbers on the host.
        record: records it.
    """

    def __init__(self, work: Work, record: Record = cuda_graph) -> None:
        self._work = work
        self._record = record
        self._calls = 0
        self._places: list[Tensor] = []  # where the recorded kernels read
        self._replay: Callable[[], None] | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Do the work on these tensors."""
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._capture(tensors)
        if self._replay is None:
            self._work(tensors)
            return
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        self._replay()

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        self._places = [tensor.clone() for tensor in tensors]
        try:
            self._replay = self._record(lambda: self._work(self._places))
        except RuntimeError as error:  # a network that waits for the device, say; nothing has run, so nothing is lost
            _log.warning("An iteration cannot be recorded as a CUDA graph, and runs kernel by kernel: %s", error)
