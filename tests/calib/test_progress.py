"""Progress: the share of expected work by hand, and the time of each phase on a clock of the test."""

import pytest
import torch
from torch import Tensor, nn

from calib import progress
from calib.blocks import Block
from calib.choices import Rounding
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.progress import Cost, Progress, ProgressMeter, Stage, expected_times
from calib.reconstruct import BlockResult

COSTS = [Cost(prepare=1.0, iterate=3.0), Cost(prepare=2.0, iterate=2.0), Cost(prepare=0.0, iterate=2.0)]
RESULT = BlockResult(name="a", layers=("a",), loss_before=2.0, loss_after=1.0, rounding=Rounding.ADAROUND)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, in a list, which the test alone moves on."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_share_is_that_of_the_expected_seconds() -> None:
    seen: list[Progress] = []
    meter = ProgressMeter(COSTS, seen.append)
    first = meter.block(0, "a", 10)
    first(5)
    meter.finished(0, RESULT, resumed=False)
    meter.block(1, "b", 4)(1)
    meter.ranges(4)(3)
    meter.ranges(4)(4)
    assert [p.fraction for p in seen] == pytest.approx([2.5 / 10, 4 / 10, 6.5 / 10, 9.5 / 10, 1.0])
    assert [p.stage for p in seen] == [Stage.BLOCK] * 3 + [Stage.RANGES] * 2
    assert [(p.index, p.total) for p in seen] == [(0, 2), (0, 2), (1, 2), (2, 2), (2, 2)]
    assert [p.result for p in seen] == [None, RESULT, None, None, None]


def test_the_seconds_of_a_phase_add_up_over_blocks_and_others_do_not_count(clock: list[float]) -> None:
    seen: list[Progress] = []
    meter = ProgressMeter(COSTS, seen.append)
    for seconds in (2.0, 3.0):
        with meter.phase("record"):
            clock[0] += seconds
        clock[0] += 50.0
        with meter.phase("fit"):
            clock[0] += 1.0
            meter.block(0, "a", 10)(1)
            clock[0] += 1.0
    meter.ranges(1)(1)
    assert seen[0].seconds == {"record": 2.0, "fit": 1.0}
    assert seen[-1].seconds == {"record": 5.0, "fit": 4.0}


class Slow(nn.Module):
    """A layer that takes some seconds on the clock of the test."""

    def __init__(self, now: list[float], seconds: float) -> None:
        super().__init__()
        self._now, self._seconds = now, seconds

    def forward(self, x: Tensor) -> Tensor:
        self._now[0] += self._seconds
        return x


class Network(nn.Module):
    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.short, self.long = Slow(now, 1.0), Slow(now, 3.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.long(self.short(x))
        return out


@pytest.mark.parametrize("rule", ["uniform", "gac"])
def test_blocks_are_expected_to_take_as_long_as_their_forward_passes(clock: list[float], rule: str) -> None:
    step = torch.arange(4).repeat_interleave(2)
    data = CalibrationSet(x=torch.zeros(8, 1, 2, 2), t=step, step=step)
    config = QuantConfig(
        activation=ActivationConfig(batch=4),
        reconstruction=ReconstructionConfig(iterations=10, batch=2),
        omega=OmegaConfig(rule=rule, groups=2, meta_steps=3, batch=2, validation_batch=1),
        weight_steps=4,
        micro_batch=4,
    )
    blocks = [Block(name=name, layers=(name,)) for name in ("short", "long")]
    short, long, ranges = expected_times(Network(clock), blocks, data, config)
    assert long.prepare == pytest.approx(3 * short.prepare)
    assert long.iterate == pytest.approx(3 * short.iterate)
    assert ranges == Cost(prepare=0.0, iterate=8 * 4.0 / 4)  # 8 samples, 4 seconds for the first 4
    fitting = 10 * progress.BACKWARD * 2 * 1.0 / 4  # iterations, passes, samples, seconds for one sample
    assert short.iterate > fitting
    assert (short.prepare > short.iterate - fitting) == (rule == "gac")
