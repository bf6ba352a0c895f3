"""Run a network once on noise, to see whether it takes what it will be given.

In: a network, and an `Example` of what it is called with. Out: what it returned, or an error of one line that says why
its forward pass failed and, if that can be found out, what would help.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calib.silence import silenced
from gaq_export.errors import GaqError

ROWS = 2  # images of a trial
_LARGEST = 2**28  # numbers of an image: 1 GiB
_HALVINGS = 6  # how often a network is taken to halve its images, when a size is looked for that it takes


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """What a network is called with: images, and a condition if it takes one.

    Attributes:
        shape: (C, H, W) of an image.
        timesteps: number of training timesteps.
        condition: one row, (1, ...), of each tensor; empty for a network called as (x, t).
    """

    shape: tuple[int, int, int]
    timesteps: int
    condition: Mapping[str, Tensor]

    def inputs(self, rows: int = ROWS) -> tuple[Any, ...]:
        """Return noise x (N, C, H, W), timesteps (N,) int64 and perhaps the condition."""
        x = torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(0))
        # The last timestep, and one from the middle; what happens at 0 depends on the sampler, which may not go there.
        t = torch.tensor([self.timesteps - 1, self.timesteps // 2] * rows)[:rows]
        cond = {name: row[:1].expand(rows, *row.shape[1:]) for name, row in self.condition.items()}
        return (x, t, cond) if cond else (x, t)


def require_image_shape(shape: tuple[int, ...]) -> None:
    """Raise GaqError unless `shape` is (C, H, W), three sizes of 1 or more, and an image fits in memory."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in shape)
    if len(shape) != 3 or not whole:
        raise GaqError(
            f"The shape of an image is (C, H, W), three whole numbers of 1 or more; found {tuple(shape)}. A signal of "
            "one dimension is (C, 1, L); videos are not supported."
        )
    if shape[0] * shape[1] * shape[2] > _LARGEST:
        raise GaqError(f"An image of shape {tuple(shape)} is larger than 1 GiB: give a smaller one.")


def require_forward(network: nn.Module, example: Example, advice: str) -> None:
    """Raise GaqError if a network's forward pass fails; only shapes are computed, so the largest takes a moment.

    Args:
        network: called as (x, t) or (x, t, cond); returns one tensor.
        example: what it is called with.
        advice: what to do if it fails and no size is found that it takes, a sentence.
    """
    try:
        with silenced("torch._subclasses.fake_tensor", logging.CRITICAL), FakeTensorMode(allow_non_fake_inputs=True):
            run(network, example.inputs())
    except Exception:  # perhaps something that has no shape without values: the run with values decides
        try:
            run(network, example.inputs())
        except Exception as error:  # whatever the network's code raises
            raise failed(network, example, error, advice) from error


def run(network: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return what a network returns, without gradients."""
    with torch.no_grad():
        return network(*inputs)


def failed(network: nn.Module, example: Example, error: Exception, advice: str) -> GaqError:
    """Return the error for a forward pass that failed, with what would help if that can be found out, else `advice`."""
    x, t, *condition = example.inputs()
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[-1].strip()[:200]}".rstrip(". :")
    hint = advice
    if _runs(network, (x, t.float(), *condition)):
        hint = "It runs with t as float32, but timesteps are int64: begin its forward with t = t.float()."
    else:
        for height, width in _larger(*example.shape[1:]):
            larger = torch.zeros(len(x), example.shape[0], height, width)
            if _runs(network, (larger, t, *condition)):
                hint = (
                    f"It takes images of {height} x {width}, whose size it can halve evenly: give such a size "
                    "(sample_size in config.json, or the shape for wrap)."
                )
                break
    return GaqError(
        f"The network's own forward pass fails for x {tuple(x.shape)} and t {tuple(t.shape)} int64: {reason}. {hint}"
    )


def _larger(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the next sizes that can be halved once, twice, ..."""
    for unit in (2**k for k in range(1, _HALVINGS + 1)):
        yield -(-height // unit) * unit, -(-width // unit) * unit


def _runs(network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        out = noise_of(run(network, inputs))
    except Exception:  # whatever the caller's code raises
        return False
    return out is not None and out.shape == inputs[0].shape


def noise_of(returned: Any) -> Tensor | None:
    """Return the one tensor in what a network returned: itself, in a tuple of one, or `sample`; None for the rest."""
    if isinstance(returned, (tuple, list)) and len(returned) == 1:
        returned = returned[0]
    if not isinstance(returned, Tensor):
        returned = getattr(returned, "sample", None)
    return returned if isinstance(returned, Tensor) else None
