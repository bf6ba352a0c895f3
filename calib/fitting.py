"""Learn the rounding of a block's weights, and scales along with it, by gradient descent on the block's loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib import adaround
from calib.adaround import LayerWeight, LearnedRounding
from calib.blocks import BlockIO
from calib.captured import Captured
from calib.choices import ActivationLearning
from calib.config import OmegaConfig, ReconstructionConfig
from calib.omega import weighting
from calib.reconstruct import WeightLoss

Start = Sequence[tuple[LayerWeight, Tensor]]  # float weight and grid of each layer, and its logits V (C, ...)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a rounding is fitted.

    Attributes:
        omega: how scores become weights.
        settings: iterations, batch, learning rates and annealing.
        scores: (N,) float64 sample scores; equal scores give plain AdaRound.
        generator: draws the mini-batches.
        on_iteration: called with the number of finished iterations.
    """

    omega: OmegaConfig
    settings: ReconstructionConfig
    scores: Tensor
    generator: torch.Generator
    on_iteration: Callable[[int], None] = lambda done: None


def fit_rounding(loss: WeightLoss, start: Start, io: BlockIO, fit: Fit, scales: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the logits after minimising sum_i omega_i l_i + lambda sum(1 - |2h - 1|^beta) with Adam.

    Nothing in an iteration waits for the device; on a CUDA GPU it is one graph, unless `scales` are learned.

    Args:
        loss: the block's loss of each sample.
        start: where to start from; without layers, `scales` alone are learned.
        io: recording of the N training samples.
        fit: how.
        scales: activation scales () that `loss` depends on; learned along with the logits, in place.
    """
    settings = fit.settings
    learner = _Learner(loss, start, scales, settings, capturable=io.device.type == "cuda" and not scales)
    share = settings.drop if settings.activations is ActivationLearning.QDROP else 0.0
    weights_of = weighting(fit.scores, fit.omega)
    for i in range(settings.iterations):
        learner.set_rate(i)
        index = torch.randperm(len(io), generator=fit.generator)[: settings.batch]
        batch = io.take(index).mixed(share, fit.generator)  # after `index`: both come from one generator
        sharpness = adaround.beta(i, settings.iterations, settings.warmup, settings.beta_start, settings.beta_end)
        learner.learn(weights_of(index).to(io.device), batch, sharpness)
        fit.on_iteration(i + 1)
    return [r.logits for r in learner.rounding]


class _Learner:
    """What is learned, and how one iteration changes it.

    Args:
        loss: the block's loss of each sample.
        start: where the rounding starts.
        scales: learned as well.
        settings: learning rates, regulariser.
        capturable: whether an iteration becomes a CUDA graph.
    """

    def __init__(
        self,
        loss: WeightLoss,
        start: Start,
        scales: Sequence[Tensor],
        settings: ReconstructionConfig,
        *,
        capturable: bool,
    ) -> None:
        self.rounding = [LearnedRounding(layer, logits) for layer, logits in start]
        self._loss, self._scales, self._settings = loss, scales, settings
        groups: list[dict[str, Any]] = [
            {"params": [r.logits for r in self.rounding], "lr": settings.learning_rate},
            {"params": [*scales]},
        ]
        self._adam = torch.optim.Adam(groups, capturable=capturable)
        self._batch: BlockIO | None = None  # the first one, for the shapes of all
        self._captured = Captured(self._learn_captured) if capturable else None

    def set_rate(self, iteration: int) -> None:
        """Let the scales' rate fall to 0 along a cosine, as in QDrop; the logits' stays as it is."""
        falling = 0.5 + 0.5 * math.cos(math.pi * iteration / self._settings.iterations)
        self._adam.param_groups[1]["lr"] = self._settings.activation_learning_rate * falling

    def learn(self, omega: Tensor, batch: BlockIO, sharpness: float | None) -> None:
        """Take one step.

        Args:
            omega: (n,) weights of the mini-batch.
            batch: its samples.
            sharpness: beta; None in the warm-up, which finds good values before they are pressed to 0 and 1.
        """
        if self._captured is None:
            self._step(omega, batch, self._settings.regulariser, sharpness)
            return
        self._batch = batch
        # In the warm-up the regulariser's strength is 0, since the kernels that are recorded are always the same.
        numbers = (0.0, 2.0) if sharpness is None else (self._settings.regulariser, sharpness)
        self._captured((omega, *torch.tensor(numbers).to(omega.device).unbind(), *batch.tensors))

    def _learn_captured(self, tensors: Sequence[Tensor]) -> None:
        omega, strength, sharpness, *rows = tensors
        assert self._batch is not None
        self._step(omega, self._batch.with_tensors(rows), strength, sharpness)

    def _step(self, omega: Tensor, batch: BlockIO, strength: float | Tensor, sharpness: float | Tensor | None) -> None:
        weights = [r.weight for r in self.rounding]
        objective = (omega * self._loss(weights, batch)).sum()
        gradients = torch.autograd.grad(objective, [*weights, *self._scales])
        for r, gradient in zip(self.rounding, gradients, strict=False):
            r.backward(gradient, strength, sharpness)
        for scale, gradient in zip(self._scales, gradients[len(weights) :], strict=True):
            scale.grad = gradient
        self._adam.step()
        for r in self.rounding:
            r.update()
