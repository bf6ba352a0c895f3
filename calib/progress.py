"""How far a calibration is, as a share of its work, so that an estimate of the time left is about right from the start.

Pieces of work differ in their time by orders of magnitude, so each counts by the seconds that it is expected to take:
forward passes are timed once, and the rest is counted in forward passes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from calib.blocks import Block
from calib.choices import OmegaRule
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.devices import HOST, device_of, synchronize
from calib.ranges import draw_batches
from calib.reconstruct import BlockResult

BACKWARD = 4.0  # a training iteration, in forward passes of its mini-batch
JACOBIAN = 4.0  # J, in forward passes of its mini-batch
# A meta-step, in passes of its validation samples.
META = {OmegaRule.MSE: 4.0, OmegaRule.FISH: 4.0, OmegaRule.GAC: 12.0, OmegaRule.GAC_EXACT: 12.0}


class Stage(StrEnum):
    """What a calibration is doing."""

    BITS = "bits"  # measuring how much each layer's bits matter
    BLOCK = "block"  # learning the rounding of a block
    RANGES = "ranges"  # observing activation ranges


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`fraction` of all the work is done; `result` is set when block `name` has just finished.

    `seconds` is the time spent so far in each phase: record, start, meta, fit, decide, ranges.
    """

    stage: Stage
    name: str
    index: int
    total: int
    fraction: float
    seconds: Mapping[str, float]
    result: BlockResult | None = None
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Expected seconds of a piece of work: before its first iteration, and for all its iterations."""

    prepare: float
    iterate: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.prepare + self.iterate


def expected_times(model: nn.Module, blocks: Sequence[Block], data: CalibrationSet, config: QuantConfig) -> list[Cost]:
    """Return what each block, then the ranges, should cost, from a timed forward pass of each block.

    Args:
        model: the float network.
        blocks: in network order.
        data: calibration samples; a few are run.
        config: iterations and batch sizes.
    """
    inputs = data.inputs(slice(config.micro_batch))
    whole, seconds = _forward_seconds(model, blocks, inputs)
    weight_samples = len(data) * config.weight_steps / max(1, len(torch.unique(data.step)))
    costs = []
    for b in blocks:
        per_sample = seconds[b.name] / len(inputs[0])
        fitting = config.reconstruction.passes * BACKWARD * config.reconstruction.batch * per_sample
        o = config.omega
        # A meta-step takes a mini-batch of each group of steps; there are no more groups than steps.
        step = META.get(o.rule, 0.0) * min(o.groups, config.weight_steps) * o.validation_batch
        meta = (JACOBIAN * o.batch + o.meta_steps * step) * per_sample if o.rule in META else 0.0
        recording = 2 * weight_samples * per_sample
        costs.append(Cost(prepare=recording + meta, iterate=fitting + recording))
    observed = sum(len(index) for _, index in draw_batches(data, config.activation, torch.Generator()))
    costs.append(Cost(prepare=0.0, iterate=observed * whole / len(inputs[0])))
    return costs


def _forward_seconds(
    model: nn.Module, blocks: Sequence[Block], inputs: tuple[Any, ...]
) -> tuple[float, dict[str, float]]:
    """Time one forward pass of the whole network, and of each block in it; one cut out of it runs by itself."""
    device = device_of(model)

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    spent: dict[str, float] = {}
    handles = []
    for b in blocks:
        if b.module is None:
            module = model.get_submodule(b.name)
            handles.append(module.register_forward_pre_hook(lambda *_, n=b.name: spent.update({n: -clock()})))
            handles.append(module.register_forward_hook(lambda *_, n=b.name: spent.update({n: spent[n] + clock()})))
    with torch.no_grad():
        for _ in range(2):  # the first pass warms up
            begin = clock()
            model(*inputs)
        whole = clock() - begin
        for b in blocks:
            if b.module is not None:
                begin = clock()
                b.module(inputs[1])
                spent[b.name] = clock() - begin
    for handle in handles:
        handle.remove()
    return whole, spent


class ProgressMeter:
    """Turns finished iterations into a share of all expected work, reports it, and adds up the time of each phase.

    Args:
        costs: expected seconds of each block, then of the ranges.
        report: called with each progress.
        device: whose work is waited for before the time of a phase is taken.
    """

    def __init__(self, costs: Sequence[Cost], report: Callable[[Progress], None], device: torch.device = HOST) -> None:
        self._costs = costs
        self._report = report
        self._device = device
        self._seconds: dict[str, float] = {}
        self._phase = ""
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside as phase `name`."""
        self._phase, self._since = name, time.perf_counter()
        yield
        synchronize(self._device)  # only here: to wait after every iteration would leave the device idle
        self._count()
        self._phase = ""

    def _count(self) -> None:
        if self._phase:
            now = time.perf_counter()
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
            self._since = now

    def block(self, index: int, name: str, iterations: int) -> Callable[[int], None]:
        """Return the function to call with the number of finished iterations of block number `index`."""
        return lambda done: self._send(index, stage=Stage.BLOCK, name=name, share=done / iterations)

    def finished(self, index: int, result: BlockResult, resumed: bool) -> None:
        """Report a finished block; `resumed` says that it was loaded, and not calibrated now."""
        self._send(index, stage=Stage.BLOCK, name=result.name, share=1.0, result=result, resumed=resumed)

    def ranges(self, batches: int) -> Callable[[int], None]:
        """Return the function to call with the number of observed batches."""
        return lambda done: self._send(
            len(self._costs) - 1, stage=Stage.RANGES, name="activation ranges", share=done / batches
        )

    def _send(
        self,
        index: int,
        *,
        stage: Stage,
        name: str,
        share: float,
        result: BlockResult | None = None,
        resumed: bool = False,
    ) -> None:
        self._count()
        cost = self._costs[index]
        work = sum(c.total for c in self._costs[:index]) + cost.prepare + share * cost.iterate
        self._report(
            Progress(
                stage=stage,
                name=name,
                index=index,
                total=len(self._costs) - 1,
                fraction=work / sum(c.total for c in self._costs),
                seconds=dict(self._seconds),
                result=result,
                resumed=resumed,
            )
        )
