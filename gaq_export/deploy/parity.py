"""Compare an engine with fake-quantized PyTorch, step by step: the ratio of signal to difference, in dB.

Two correct implementations never agree to the last bit. Where a value lies on a rounding edge, a difference in its
seventh digit moves it by a whole quantization step, and that moves others. So a quantized network has a resolution: the
SQNR it has against itself when the input of every quantized layer changes by one part in a million (or, where the
engine's floats have 16 bits, by about their rounding error). No engine can be expected to come closer than that, and at
the last sampling steps it can be far below 40 dB. An engine passes if every step reaches its floor or comes within
`margin_db` of the network's own resolution.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.data import CalibrationSet
from calib.sqnr import EQUAL_DB, sqnr_db

IMAGES = 4  # of each checked step
PERTURBATION = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}  # of the input of every layer, relative
DRAWS = 8  # perturbations to try before a step fails: in a small network it is chance whether one moves a value


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Least SQNR of a step, in dB: `floor_db`, or the network's resolution less `margin_db` where that is lower."""

    floor_db: float
    margin_db: float

    def required_db(self, resolution_db: float) -> float:
        """Return the least SQNR of a step where the network has this resolution."""
        return min(self.floor_db, resolution_db - self.margin_db)


# ort-cpu also rounds the output of every convolution, which no other graph does.
TOLERANCES: Mapping[str, Tolerance] = {
    "reference": Tolerance(floor_db=40.0, margin_db=6.0),
    "trt": Tolerance(floor_db=40.0, margin_db=6.0),
    "trt-fp8": Tolerance(floor_db=40.0, margin_db=6.0),
    "openvino": Tolerance(floor_db=40.0, margin_db=6.0),
    "ort-cuda": Tolerance(floor_db=40.0, margin_db=6.0),
    "ort-cpu": Tolerance(floor_db=30.0, margin_db=20.0),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """SQNR of an engine against its reference, and of the reference against itself: one value a checked step, in dB."""

    steps: tuple[int, ...]
    sqnr_db: tuple[float, ...]
    resolution_db: tuple[float, ...]
    tolerance: Tolerance

    @property
    def worst(self) -> int:
        """Index of the checked step that is furthest below its required SQNR, or least above it."""
        return min(range(len(self.steps)), key=lambda i: self.sqnr_db[i] - self.required_db(i))

    @property
    def passed(self) -> bool:
        """Whether every step reaches its required SQNR."""
        return self.sqnr_db[self.worst] >= self.required_db(self.worst)

    def required_db(self, i: int) -> float:
        """Return the required SQNR of checked step number `i`."""
        return self.tolerance.required_db(self.resolution_db[i])


def compare(
    reference: nn.Module,
    layers: Iterable[str],
    other: Callable[..., Tensor],
    data: CalibrationSet,
    tolerance: Tolerance,
    *,
    compute: str = "float32",
    steps: int = 10,
    images: int = IMAGES,
) -> Parity:
    """Run both on the same inputs and compare.

    Args:
        reference: fake-quantized module.
        layers: names of its quantized layers.
        other: the engine, called like the reference.
        data: calibration samples to take the inputs from.
        tolerance: what `Parity.passed` requires.
        compute: type of the engine's floats, a key of `PERTURBATION`.
        steps: how many sampling steps, evenly spaced.
        images: how many images of each.
    """
    present = torch.unique(data.step)  # an engine that takes turns with others has only some of the steps
    chosen = present[torch.linspace(0, len(present) - 1, min(steps, len(present))).round().long()]
    layers = tuple(layers)
    measured = []
    resolution = []
    with torch.no_grad():
        for step in chosen:
            sample = data.take((data.step == step).nonzero()[:images, 0])
            args = sample.inputs()
            ratio, lowest = closeness(reference, layers, args, other(*args), tolerance, compute=compute, seed=int(step))
            measured.append(ratio)
            resolution.append(lowest)
    return Parity(
        steps=tuple(int(s) for s in chosen),
        sqnr_db=tuple(measured),
        resolution_db=tuple(resolution),
        tolerance=tolerance,
    )


def closeness(
    reference: nn.Module,
    layers: Sequence[str],
    args: tuple[Any, ...],
    actual: Tensor,
    tolerance: Tolerance,
    *,
    compute: str = "float32",
    seed: int = 0,
) -> tuple[float, float]:
    """Return the SQNR in dB of an actual output against the reference's, and the reference's resolution there.

    Args:
        reference: module that computes the expected output.
        layers: names of those whose inputs are perturbed.
        args: what it is called with.
        actual: what the other implementation computed, the shape of the reference's output.
        tolerance: the resolution is measured again while the result is below it.
        compute: type of the other's floats, a key of `PERTURBATION`.
        seed: of the perturbations.
    """
    expected = reference(*args)
    measured = sqnr_db(expected, actual)
    lowest = EQUAL_DB
    # The lowest of several draws, because each perturbation moves other values over an edge.
    for draw in range(DRAWS):
        with perturbed(reference, layers, PERTURBATION[compute], seed=DRAWS * seed + draw):
            lowest = min(lowest, sqnr_db(expected, reference(*args)))
        if measured >= tolerance.required_db(lowest):
            break
    return measured, lowest


def merge(parts: Sequence[Parity]) -> Parity:
    """Return the parities of engines that take turns as one parity, in the order of the steps."""
    rows = sorted(row for part in parts for row in zip(part.steps, part.sqnr_db, part.resolution_db, strict=True))
    steps, sqnr, resolution = zip(*rows, strict=True)
    return Parity(steps=steps, sqnr_db=sqnr, resolution_db=resolution, tolerance=parts[0].tolerance)


@contextmanager
def perturbed(network: nn.Module, layers: Iterable[str], relative: float, seed: int) -> Iterator[None]:
    """Add noise to the input of each layer, before it is rounded, of a size `relative` to its root mean square.

    Perturbing only the network's input would not be enough, since runtimes differ in every layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def nudge(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]  # (N, C, H, W) of a convolution, (N, ..., D) of a linear layer
        size = relative * x.square().mean().sqrt()
        return x + size * torch.randn(x.shape, generator=generator), *args[1:]

    handles = [network.get_submodule(name).register_forward_pre_hook(nudge, prepend=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
