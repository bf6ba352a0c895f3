"""Work that is recorded once and replayed, with a stand-in for the CUDA graph: what it runs is what a graph would."""

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from calib.captured import WARM_UP, Captured


def test_recorded_work_reads_the_tensors_of_each_call() -> None:
    total, recorded = torch.zeros(2), []

    def work(tensors: Sequence[Tensor]) -> None:
        total.add_(tensors[0] * tensors[1])

    def record(launch: Callable[[], None]) -> Callable[[], None]:
        recorded.append(launch)  # a graph does not run what it records
        return launch

    captured = Captured(work, record)
    for i in range(WARM_UP + 4):
        captured((torch.full((2,), float(i)), torch.tensor(2.0)))
    assert len(recorded) == 1
    assert total.tolist() == [2.0 * sum(range(WARM_UP + 4))] * 2


def test_work_that_cannot_be_recorded_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def refuse(launch: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = Captured(lambda tensors: calls.append(float(tensors[0])), refuse)
    with caplog.at_level(logging.WARNING):
        for i in range(WARM_UP + 3):
            captured((torch.tensor(float(i)),))
    assert calls == [float(i) for i in range(WARM_UP + 3)]
    assert len(caplog.messages) == 1
