"""Activation grids that are learned: their gradients, who shares one, and what calibration makes of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib.block_recording import open_recorder
from calib.blocks import Block, BlockIO
from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.learned_grids import LearnedGrid, initial_grids, learnable_round, rounded_inputs
from calib.plan import Grid, QuantPlan, save_plan
from calib.progress import Progress

BITS3 = Grid(scale=0.5, bits=3, zero=(-1,))  # codes -4 to 3, values -1.5 to 2.0


class _Net(nn.Module):
    """Two blocks; in the second two layers read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 1))
        self.second = _Pair()
        self.tail = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.second(self.first(self.head(x + t.reshape(-1, 1, 1, 1) / 100)))
        out: Tensor = self.tail(h)
        return out


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.a(x) * torch.sigmoid(self.b(x)))
        return out


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Net().eval()


def _data() -> CalibrationSet:
    x = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    step = torch.arange(6).repeat_interleave(4)
    return CalibrationSet(x=x, t=95 - 18 * step, step=step)


def _config(activations: str, **more: float) -> QuantConfig:
    return QuantConfig(
        activation=ActivationConfig(bits=4, batch=8),
        reconstruction=ReconstructionConfig(
            iterations=6,
            batch=8,
            learning_rate=1e-2,
            activations=activations,
            activation_iterations=5,
            activation_learning_rate=1e-2,
            **more,
        ),
        omega=OmegaConfig(rule="uniform"),
        micro_batch=8,
    )


@pytest.fixture
def recorded(net: nn.Module) -> Callable[[str], BlockIO]:
    """Return what records a block in the network and in one with other weights, which stands for the float one."""
    other = _Net().eval()

    def record(name: str) -> BlockIO:
        with open_recorder(other, net, _data(), 8, reference=True) as recording:
            return recording.record(Block(name=name, layers=()))

    return record


@pytest.mark.parametrize(
    ("x", "value", "slope", "step_slope"),
    [
        (0.7, 0.5, 1.0, 1.0 - 1.4),  # inside: round(x / s) - x / s
        (9.0, 2.0, 0.0, 4.0),  # above: high - z
        (-9.0, -1.5, 0.0, -3.0),  # below: low - z
    ],
)
def test_the_gradients_are_those_of_lsq(x: float, value: float, slope: float, step_slope: float) -> None:
    inputs, step = torch.tensor([x], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    out = learnable_round(inputs, step, BITS3)
    assert out.tolist() == [value]
    gradients = torch.autograd.grad(out.sum(), (inputs, step))
    assert [float(g) for g in gradients] == pytest.approx([slope, step_slope], abs=1e-5)


def test_half_of_what_a_layer_reads_is_left_float() -> None:
    layer, learned = nn.Identity(), LearnedGrid(layers=("",), start=BITS3, scale=torch.tensor(0.5))
    x = 0.1 + torch.zeros(10_000)
    with rounded_inputs(layer, [learned], 0.5, torch.Generator().manual_seed(0)):
        out = layer(x)
    assert 0.48 < float((out == x).float().mean()) < 0.52
    assert set(out.unique().tolist()) == {0.0, float(x[0])}
    assert torch.equal(layer(x), x)


def test_layers_that_read_the_same_tensor_share_a_grid_over_the_range_seen(net: nn.Module, recorded) -> None:
    io = recorded("second")
    activation = ActivationConfig(bits=8, rule="minmax", symmetric=True, batch=8)
    learned = initial_grids(net.second, ["a", "b", "out"], io, activation, torch.Generator())
    assert [grid.layers for grid in learned] == [("a", "b"), ("out",)]
    assert learned[0].current.scale == pytest.approx(float(io.inputs[0].abs().max()) / 127, rel=1e-6)


def _saved(plan: QuantPlan, folder: Path) -> bytes:
    save_plan(plan, folder / "plan.safetensors")
    return (folder / "plan.safetensors").read_bytes() + (folder / "plan.json").read_bytes()


class _Stop(Exception):
    pass


@pytest.mark.parametrize("activations", ["qdrop", "lsq"])
def test_learned_grids_are_in_the_plan_and_survive_an_interruption(net, activations: str, tmp_path: Path) -> None:
    config = _config(activations, fine=0.8 if activations == "qdrop" else 0.0)
    plan = calibrate(net, _data(), config, timesteps=100)
    observed = calibrate(net, _data(), _config("float"), timesteps=100)
    assert plan.layers.keys() == {"first.0", "first.2", "second.a", "second.b", "second.out"}
    assert all(plan.layers[name].input != observed.layers[name].input for name in plan.layers)
    assert plan.layers["second.a"].input == plan.layers["second.b"].input

    def stop(progress: Progress) -> None:
        if progress.result is not None:
            raise _Stop

    with pytest.raises(_Stop):
        calibrate(net, _data(), config, timesteps=100, folder=tmp_path / "blocks", on_progress=stop)
    resumed = calibrate(net, _data(), config, timesteps=100, folder=tmp_path / "blocks")
    assert _saved(resumed, tmp_path) == _saved(plan, tmp_path)
    wider = dataclasses.replace(config, activation=dataclasses.replace(config.activation, bits=8))
    again = calibrate(net, _data(), wider, timesteps=100, folder=tmp_path / "blocks")
    assert _saved(again, tmp_path) == _saved(calibrate(net, _data(), wider, timesteps=100), tmp_path)


def test_learning_the_grids_helps_where_they_are_coarse(net) -> None:
    """At 3 bits, ranges by the farthest value are too wide; learning them lowers the error of the whole network."""
    errors = {}
    for activations in ("float", "qdrop", "lsq"):
        config = _config(activations)
        rates = {"iterations": 60, "activation_iterations": 60, "activation_learning_rate": 2e-2}
        config = dataclasses.replace(
            config,
            activation=ActivationConfig(bits=3, rule="minmax", symmetric=True, batch=8),
            reconstruction=dataclasses.replace(config.reconstruction, **rates),
        )
        fake, data = fake_quantized(net, calibrate(net, _data(), config, timesteps=100)), _data()
        with torch.no_grad():
            errors[activations] = float((fake(data.x, data.t) - net(data.x, data.t)).square().mean())
    assert errors["qdrop"] < errors["float"]
    assert errors["lsq"] < errors["float"]


def test_learned_grids_cannot_be_per_step() -> None:
    with pytest.raises(CalibError, match="the same for all steps"):
        dataclasses.replace(_config("qdrop"), activation=ActivationConfig(per_step=True))
