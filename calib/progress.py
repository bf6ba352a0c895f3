"""How far a calibration is, as a share of its work, so that an estimate of the time left is honest from the start."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from calib.blocks import Block
from calib.config import QuantConfig
from calib.data import CalibrationSet
from calib.ranges import batch_count
from calib.reconstruct import BlockResult

BACKWARD = 3.0  # a training iteration costs about three forward passes
META = 40.0  # a meta-step, in forward passes of one mini-batch: five groups, each with gradient, J, J^T and H products


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`fraction` of all the work is done; `result` is set when block `name` has just finished."""

    stage: str  # "block" or "ranges"
    name: str
    index: int
    total: int
    fraction: float
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


def block_costs(model: nn.Module, blocks: Sequence[Block], data: CalibrationSet, config: QuantConfig) -> list[Cost]:
    """Return what each block, then the ranges, should cost, from one timed forward pass of each block.

    Args:
        model: the float network.
        blocks: in network order.
        data: calibration samples; a few are run.
        config: iterations and batch sizes.
    """
    rows = min(config.micro_batch, len(data))
    starts: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    handles = []
    for b in blocks:
        if b.module is not None:
            continue
        module = model.get_submodule(b.name)
        handles.append(module.register_forward_pre_hook(lambda *_, n=b.name: starts.update({n: time.perf_counter()})))
        handles.append(
            module.register_forward_hook(lambda *_, n=b.name: spans.update({n: (starts[n], time.perf_counter())}))
        )
    with torch.no_grad():
        for _ in range(2):  # the first pass warms up
            begin = time.perf_counter()
            model(data.x[:rows], data.t[:rows])
        whole = time.perf_counter() - begin
        for b in blocks:
            if b.module is not None:  # runs by itself, as if at the start of the network
                start = time.perf_counter()
                b.module(data.t[:rows])
                spans[b.name] = (begin, begin + time.perf_counter() - start)
    for handle in handles:
        handle.remove()
    weight_samples = len(data) * config.weight_steps / max(1, len(torch.unique(data.step)))
    costs = []
    for b in blocks:
        start, end = spans[b.name]
        per_sample = (end - start) / rows
        recording = weight_samples / rows * 2 * (end - begin)
        fitting = config.reconstruction.iterations * BACKWARD * config.reconstruction.batch * per_sample
        meta = config.omega.meta_steps * META * config.omega.batch * per_sample if config.omega.rule == "gac" else 0.0
        costs.append(Cost(prepare=recording + meta, iterate=fitting + weight_samples * per_sample * 2))
    ranges = batch_count(len(data), config.activation) * whole * config.activation.batch / rows
    costs.append(Cost(prepare=0.0, iterate=ranges))
    return costs


class Meter:
    """Turn finished iterations into a share of all the work expected, and report it."""

    def __init__(self, costs: Sequence[Cost], report: Callable[[Progress], None]) -> None:
        self._costs, self._report = costs, report

    def block(self, index: int, name: str, iterations: int) -> Callable[[int], None]:
        """Return what to call with the number of finished iterations of block `index`."""
        return lambda done: self._send(index, stage="block", name=name, share=done / iterations)

    def finished(self, index: int, result: BlockResult, resumed: bool) -> None:
        """Report a finished block."""
        self._send(index, stage="block", name=result.name, share=1.0, result=result, resumed=resumed)

    def ranges(self, batches: int) -> Callable[[int], None]:
        """Return what to call with the number of observed batches."""
        return lambda done: self._send(
            len(self._costs) - 1, stage="ranges", name="activation ranges", share=done / batches
        )

    def _send(
        self,
        index: int,
        *,
        stage: str,
        name: str,
        share: float,
        result: BlockResult | None = None,
        resumed: bool = False,
    ) -> None:
        cost = self._costs[index]
        work = sum(c.total for c in self._costs[:index]) + cost.prepare + share * cost.iterate
        self._report(
            Progress(
                stage=stage,
                name=name,
                index=index,
                total=len(self._costs) - 1,
                fraction=work / sum(c.total for c in self._costs),
                result=result,
                resumed=resumed,
            )
        )
