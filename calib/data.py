"""The calibration set: what the float network saw, at every sampling step, for every image.

`t` is a training timestep, `step` an index into the sampling steps; 0 is the noisiest. A conditional network is
called with a third argument, `cond`: its conditions (class labels, a text's states) by name, the batch first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calib.devices import HOST
from calib.errors import CalibError

NO_CONDITION: Mapping[str, Tensor] = {}


def example_inputs(
    count: int,
    shape: tuple[int, ...],
    t: int,
    cond: Mapping[str, Tensor] = NO_CONDITION,
    device: torch.device = HOST,
) -> tuple[Any, ...]:
    """Return inputs that fit a network: zeros (count, *shape), one timestep, and the first condition.

    Args:
        count: rows N.
        shape: (C, H, W).
        t: the timestep of all rows.
        cond: conditions by name, at least one row each.
        device: of the network.
    """
    condition = {name: tensor[:1].repeat_interleave(count, 0).to(device) for name, tensor in cond.items()}
    x, times = torch.zeros(count, *shape, device=device), torch.full((count,), t, device=device)
    return (x, times, condition) if condition else (x, times)


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """N network inputs: `x` (N, C, H, W) float32, `t` (N,) int64, `step` (N,) int64, `cond` (N, ...) each.

    They lie on the host; `device` is that of the network, where `inputs` puts what it returns.
    """

    x: Tensor
    t: Tensor
    step: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=lambda: NO_CONDITION)
    device: torch.device = HOST

    def __post_init__(self) -> None:
        rows = {"x": self.x, "t": self.t, "step": self.step, **self.cond}
        sizes = {len(tensor) for tensor in rows.values()}
        if len(sizes) != 1 or 0 in sizes:
            counts = ", ".join(f"{len(tensor)} {name}" for name, tensor in rows.items())
            raise CalibError(f"A calibration set needs as many of everything, at least one; found {counts}.")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> "CalibrationSet":
        """Return the samples at `index` (M,) int64."""
        cond = {name: tensor[index] for name, tensor in self.cond.items()}
        return replace(self, x=self.x[index], t=self.t[index], step=self.step[index], cond=cond)

    def inputs(self, index: Tensor | slice = slice(None)) -> tuple[Any, ...]:
        """Return what the network is called with for the samples at `index`: x, t, and cond if there is any."""
        cond = {name: tensor[index].to(self.device) for name, tensor in self.cond.items()}
        x, t = self.x[index].to(self.device), self.t[index].to(self.device)
        return (x, t, cond) if cond else (x, t)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds, in a fixed order."""
        return (self.x, self.t, self.step, *(self.cond[name] for name in sorted(self.cond)))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices into `data` of the training and validation samples, and the task group (0 .. K-1) of the latter."""

    data: CalibrationSet
    train: Tensor
    validation: Tensor
    group: Tensor


def thin_steps(data: CalibrationSet, steps: int) -> CalibrationSet:
    """Keep the samples of every k-th sampling step, k chosen so that about `steps` remain (at least one)."""
    present = torch.unique(data.step)
    chosen = present[:: max(1, len(present) // steps)]
    return data.take(torch.isin(data.step, chosen).nonzero()[:, 0])


def split(data: CalibrationSet, fraction: float, groups: int, generator: torch.Generator) -> Split:
    """Set aside the same share of every step's samples for validation; group the steps in order.

    Args:
        data: the samples, at least two; a step that has only one trains alone, but if all do, one sample validates.
        fraction: share of each step's samples that validate (rounded, at least one).
        groups: number of contiguous groups of steps; fewer if there are fewer steps.
        generator: draws the validation samples.

    Raises:
        CalibError: there is one sample.
    """
    steps, position = torch.unique(data.step, return_inverse=True)
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for k in range(len(steps)):
        members = (position == k).nonzero()[:, 0]
        # Step by step, and never all of them: at least one sample of each step trains.
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if len(data) < 2:
        raise CalibError("There is one sample, which cannot train and validate; collect at least 2 images.")
    if not bool(chosen.any()):
        chosen[torch.randint(len(data), (1,), generator=generator)] = True
    # (N,): consecutive steps share a group, about as many in each.
    group = position * min(groups, len(steps)) // len(steps)
    validation = chosen.nonzero()[:, 0]
    return Split(data=data, train=(~chosen).nonzero()[:, 0], validation=validation, group=group[validation])
