"""The check of an engine against PyTorch: what it measures, what passes, what does not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from calib.sqnr import sqnr_db
from gaq_export.deploy.parity import TOLERANCES, Parity, Tolerance, compare, perturbed
from gaq_export.models.loader import LoadedModel, load_model

TRT = TOLERANCES["trt"]


class Same(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0.5, 1.0, 0.75)


class Edge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.round = Round()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.round(x)


def test_sqnr_is_ten_decibels_for_each_factor_ten_of_noise_power() -> None:
    # |reference|^2 = 25, |difference|^2 = 0.25: a factor 100
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.3, 4.4])) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0])) == pytest.approx(0, abs=1e-9)
    assert sqnr_db(torch.ones(4), torch.ones(4)) == 200


def test_a_step_needs_its_floor_or_to_come_near_the_networks_own_resolution() -> None:
    def passes(sqnr: float, resolution: float) -> bool:
        return Parity(
            steps=(0, 9),
            sqnr_db=(45.0, sqnr),
            resolution_db=(60.0, resolution),
            tolerance=Tolerance(floor_db=40, margin_db=6),
        ).passed

    assert passes(40.0, 80.0)
    assert not passes(39.9, 80.0)
    assert passes(24.0, 30.0)
    assert not passes(23.9, 30.0)


def test_the_worst_step_is_the_one_nearest_its_own_limit() -> None:
    result = Parity(steps=(0, 4, 9), sqnr_db=(41.0, 45.0, 25.0), resolution_db=(60.0, 60.0, 28.0), tolerance=TRT)
    assert [result.required_db(i) for i in range(3)] == [40.0, 40.0, 28.0 - TRT.margin_db]
    assert result.worst == 0


@pytest.fixture(scope="module")
def mnist() -> LoadedModel:
    """A trained network: a random one has too little resolution to notice 5 %."""
    return load_model("ddpm-mnist")


@pytest.fixture(scope="module")
def data(mnist: LoadedModel) -> CalibrationSet:
    """Noisy images as the network meets them: pure noise, then half way."""
    x = torch.randn(4, *mnist.shape, generator=torch.Generator().manual_seed(1))
    return CalibrationSet(x=x, t=torch.tensor([990, 990, 800, 800]), step=torch.tensor([0, 0, 1, 1]))


@pytest.fixture(scope="module")
def plan(mnist: LoadedModel, data) -> QuantPlan:
    settings = QuantConfig(
        reconstruction=ReconstructionConfig(iterations=1, batch=1), omega=OmegaConfig(rule="uniform"), micro_batch=2
    )
    return calibrate(mnist.network, data, settings, timesteps=1000)


def test_an_equal_network_passes_and_one_that_is_off_by_five_percent_fails(mnist, plan, data) -> None:
    fake = fake_quantized(mnist.network, plan)
    same = compare(fake, plan.layers, fake, data, TRT)
    assert same.sqnr_db == (200.0, 200.0)
    assert same.steps == (0, 1)
    assert same.passed
    off = compare(fake, plan.layers, lambda x, t: 1.05 * fake(x, t), data, TRT)
    assert off.sqnr_db == pytest.approx((26.02, 26.02), abs=0.01)
    assert not off.passed


def test_one_layer_with_wrong_weights_fails(mnist, plan, data) -> None:
    name, layer = next(iter(plan.layers.items()))
    wrong = replace(plan, layers={**plan.layers, name: replace(layer, weight_scale=1.2 * layer.weight_scale)})
    fake, broken = fake_quantized(mnist.network, plan), fake_quantized(mnist.network, wrong)
    assert not compare(fake, plan.layers, broken, data, TRT).passed


def test_the_resolution_leaves_the_network_as_it_was(mnist, plan, data) -> None:
    fake = fake_quantized(mnist.network, plan)
    with torch.no_grad():
        before = fake(data.x, data.t)
        with perturbed(fake, plan.layers, 1e-6, seed=0):
            within = fake(data.x, data.t)
        assert torch.equal(fake(data.x, data.t), before)
    assert 30 < sqnr_db(before, within) < 100


def test_checked_steps_are_spread_evenly_over_those_there_are() -> None:
    x, step = torch.ones(100, 1, 2, 2), torch.arange(100)
    network = Same()
    result = compare(network, (), network, CalibrationSet(x=x, t=step, step=step), TRT, steps=4)
    assert result.steps == (0, 33, 66, 99)


def test_a_step_is_tried_with_several_perturbations_before_it_fails() -> None:
    x, step = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)  # 0.5 lies on an edge
    network = Edge()

    def engine(x: Tensor, t: Tensor) -> Tensor:  # half of its values fall on the other side
        return torch.where(torch.arange(2) == 0, network(x, t), torch.tensor(0.75))

    result = compare(network, ("round",), engine, CalibrationSet(x=x, t=step, step=step), TRT)
    assert 10 < result.resolution_db[0] < 25
    assert result.passed
