"""Thinning and splitting a calibration set."""

import pytest
import torch
from torch import nn

from calib.data import CalibrationSet, split, thin_steps
from calib.errors import CalibError


def _set(steps: int, images: int) -> CalibrationSet:
    step = torch.arange(steps).repeat_interleave(images)
    return CalibrationSet(x=torch.randn(steps * images, 1, 2, 2), t=step * 10, step=step)


def test_thinning_keeps_every_kth_step_whole() -> None:
    thinned = thin_steps(_set(100, 3), 20)
    assert torch.unique(thinned.step).tolist() == list(range(0, 100, 5))
    assert len(thinned) == 60


def test_the_split_takes_as_many_samples_of_every_step_and_loses_none() -> None:
    parts = split(_set(20, 40), 0.05, 5, torch.Generator().manual_seed(0))
    held_out = parts.data.take(parts.validation)
    assert torch.bincount(held_out.step).tolist() == [2] * 20
    assert torch.equal(torch.cat([parts.train, parts.validation]).sort()[0], torch.arange(800))
    assert torch.bincount(parts.group).tolist() == [8] * 5
    assert torch.equal(parts.group, held_out.step // 4)


def test_a_step_of_one_sample_trains_alone() -> None:
    data = _set(3, 4)
    parts = split(data.take(torch.tensor([0, 1, 2, 3, 4])), 0.25, 5, torch.Generator().manual_seed(0))
    assert parts.data.step[parts.validation].tolist() == [0]
    assert 4 in parts.train


def test_where_all_steps_have_one_sample_one_validates() -> None:
    parts = split(_set(3, 1), 0.05, 5, torch.Generator().manual_seed(0))
    assert (len(parts.train), len(parts.validation)) == (2, 1)


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(CalibError, match=r"There is one sample.*collect at least 2"):
        split(_set(1, 1), 0.05, 5, torch.Generator())


def test_a_set_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(CalibError, match="at least one; found 2 x, 3 t, 2 step"):
        CalibrationSet(x=torch.zeros(2, 1, 1, 1), t=torch.zeros(3), step=torch.zeros(2))


def test_conditions_go_where_their_samples_go(class_conditional: tuple[nn.Module, CalibrationSet]) -> None:
    _, samples = class_conditional
    part = samples.take(torch.tensor([3, 12]))
    assert part.cond["class_labels"].tolist() == [3, 2]
    x, t, cond = part.inputs(slice(1))
    assert (x.shape, t.tolist(), cond["class_labels"].tolist()) == ((1, 1, 8, 8), [90], [3])
    assert len(CalibrationSet(x=samples.x, t=samples.t, step=samples.step).inputs()) == 2
