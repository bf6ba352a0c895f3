"""One block by itself: its codes, losses and scores against the pieces that they are made of."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calib import affine
from calib.block_calibration import Calibration, calibrate_block
from calib.block_recording import open_recorder
from calib.block_state import BlockState
from calib.blocks import Block
from calib.calibrate import weight_samples
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.progress import Cost, ProgressMeter
from calib.sample_store import SampleStore
from calib.shared_copy import copy_sharing_tensors


class Net(nn.Module):
    """A block of two convolutions behind a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(1, 4, 1)
            self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.block(self.enter(x))
        return out


BLOCK = Block(name="block", layers=("block.0", "block.2"))


def begin(**more: object) -> Calibration:
    model = Net().eval()
    step = torch.arange(4).repeat_interleave(6)
    x = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    data = CalibrationSet(x=x, t=90 - 20 * step, step=step)
    config = QuantConfig(
        activation=ActivationConfig(batch=8),
        reconstruction=ReconstructionConfig(
            iterations=40, batch=8, learning_rate=2e-2, activation_iterations=3, **more
        ),
        omega=OmegaConfig(rule="uniform", groups=2, meta_steps=2, batch=8, validation_batch=2),
        micro_batch=8,
    )
    weights = {name: model.get_parameter(f"{name}.weight") for name in BLOCK.layers}
    return Calibration(
        model=model,
        network=copy_sharing_tensors(model),
        scales={name: affine.search_weight_scale(w, 3) for name, w in weights.items()},
        bits=dict.fromkeys(BLOCK.layers, 3),
        data=data,
        samples=weight_samples(data, config, model),
        config=config,
        key="",
        store=SampleStore(),
        meter=ProgressMeter([Cost(prepare=0.0, iterate=1.0)] * 2, lambda progress: None),
    )


def run(calibration: Calibration) -> tuple[BlockState, list[int], Tensor]:
    """Return what the block gives, the iterations that were reported, and the scores that it started from."""
    scores = torch.full((len(calibration.samples.train),), 0.125, dtype=torch.float64)
    done: list[int] = []
    reconstruction = calibration.config.reconstruction
    with open_recorder(
        calibration.model,
        calibration.network,
        calibration.samples.data,
        8,
        reference=reconstruction.wants_reference,
    ) as recorder:
        return calibrate_block(calibration, BLOCK, recorder.record(BLOCK), scores, done.append), done, scores


def loss(calibration: Calibration, codes: dict[str, Tensor]) -> float:
    """Return the mean block loss of the training samples, from plain calls of a network with these codes."""
    x = calibration.samples.data.x[calibration.samples.train]
    model, quantized = calibration.model, Net().eval()
    with torch.no_grad():
        for name, integers in codes.items():
            weight = affine.dequantize_weight(integers, calibration.scales[name])
            quantized.get_parameter(f"{name}.weight").copy_(weight)
        error = quantized.block(model.enter(x)) - model.block(model.enter(x))
    return float(error.square().sum(1).mean())


def test_the_losses_are_those_of_the_codes_and_learning_lowers_them() -> None:
    calibration = begin()
    state, done, scores = run(calibration)
    nearest = {
        name: affine.quantize_weight(calibration.model.get_parameter(f"{name}.weight"), calibration.scales[name], 3)
        for name in BLOCK.layers
    }
    assert state.result.loss_before == pytest.approx(loss(calibration, nearest), rel=1e-4)
    assert state.result.loss_after == pytest.approx(loss(calibration, state.codes), rel=1e-4)
    assert state.result.loss_after < state.result.loss_before
    assert all(int((state.codes[name] - nearest[name]).abs().max()) <= 1 for name in BLOCK.layers)
    assert done == list(range(1, 41))
    assert torch.equal(state.scores, scores)  # the rule "uniform" moves none
    assert state.grids == {}


def test_the_networks_are_left_as_they_were() -> None:
    calibration = begin(activations="qdrop")
    before = {name: value.clone() for name, value in calibration.model.state_dict().items()}
    run(calibration)
    for network in (calibration.model, calibration.network):
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_gradient_alignment_moves_the_scores_of_one_mini_batch() -> None:
    calibration = begin()
    omega = replace(calibration.config.omega, rule="gac")
    calibration = replace(calibration, config=replace(calibration.config, omega=omega))
    state, _, scores = run(calibration)
    assert state.scores.shape == scores.shape
    assert int((state.scores != scores).sum()) == 8


@pytest.mark.parametrize(("activations", "iterations"), [("qdrop", 40), ("lsq", 43)])
def test_learned_grids_come_with_the_rounding_or_after_it(activations: str, iterations: int) -> None:
    state, done, _ = run(begin(activations=activations))
    assert state.grids.keys() == set(BLOCK.layers)
    assert done == list(range(1, iterations + 1))


def test_each_purpose_has_another_generator_which_depends_on_nothing_else() -> None:
    calibration = begin()
    draws = {purpose: torch.rand(3, generator=calibration.generator(BLOCK, purpose)) for purpose in ("fit", "meta")}
    assert not torch.equal(draws["fit"], draws["meta"])
    assert torch.equal(draws["fit"], torch.rand(3, generator=begin().generator(BLOCK, "fit")))
