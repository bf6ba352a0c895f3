"""Calibration with the network on another device than the host: nothing mixes the two, and the plan is the same.

The device computes with the host's kernels, so that rounding starts from the float weight and ends where it does there.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib import diagnose, step_scales
from calib.block_recording import open_recorder
from calib.blocks import Block
from calib.calibrate import calibrate, weight_samples
from calib.choices import Cache
from calib.config import (
    ActivationConfig,
    MixedConfig,
    OmegaConfig,
    QuantConfig,
    ReconstructionConfig,
    SelectionConfig,
    SurgeryConfig,
)
from calib.data import CalibrationSet
from calib.devices import device_of, on_device
from calib.fakequant import fake_quantized
from calib.sample_store import SampleStore
from tests.second_device import DeviceTensor, second_device

STEPS = ReconstructionConfig(iterations=2, batch=4, activation_iterations=2)
UNIFORM = OmegaConfig(rule="uniform", validation=0.25)
BASE = QuantConfig(
    reconstruction=STEPS, omega=UNIFORM, activation=ActivationConfig(batch=4, batches=2), micro_batch=4, weight_steps=2
)


class Small(nn.Module):
    """A convolution, a residual block with attention and one more convolution; the step enters as a layer of its own.

    Without a group norm, whose gradients `torch.func.vmap` does not take apart on tensors like these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.block = Attending()
        self.leave = nn.Conv2d(16, 1, 3, padding=1)
        self.scale = torch.full((1,), 0.5)  # neither parameter nor buffer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x) + self.time(t[:, None] / 100)[:, :, None, None]
        return self.leave(torch.cat((self.block(h), h), 1)) * self.scale


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        rows = torch.relu(self.first(h)).flatten(2).mT  # (N, C, H, W) -> (N, H * W, C)
        q, k, v = self.to_q(rows), self.to_k(rows), self.to_v(rows)
        return nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(h.shape) + h


@pytest.fixture
def network() -> nn.Module:
    """The network on the host."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().eval().requires_grad_(False)


@pytest.fixture
def data() -> CalibrationSet:
    """Twelve samples, four at each of three steps."""
    x = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    step = torch.arange(3).repeat_interleave(4)
    return CalibrationSet(x=x, t=90 - 40 * step, step=step)


@pytest.fixture
def on_second() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Return what moves a module to the second device."""
    with second_device() as place:
        yield lambda module: on_device(module, place)


def activation(**settings: object) -> QuantConfig:
    return replace(BASE, activation=replace(BASE.activation, **settings))  # type: ignore[arg-type]


def reconstruction(**settings: object) -> QuantConfig:
    return replace(BASE, reconstruction=replace(STEPS, **settings))  # type: ignore[arg-type]


SETTINGS = {
    "uniform": BASE,
    "tfmq": replace(BASE, convention="tfmq"),
    "gac": replace(BASE, omega=OmegaConfig(rule="gac", meta_steps=1, batch=4, validation_batch=2)),
    "gac-exact": replace(BASE, omega=OmegaConfig(rule="gac-exact", meta_steps=1, batch=4, validation_batch=2)),
    "gptq": reconstruction(start="gptq"),
    "qdrop": reconstruction(activations="qdrop"),
    "lsq": reconstruction(activations="lsq"),
    "fine": reconstruction(fine=0.5),
    "each step": activation(per_step=True),
    "step sizes": activation(per_step=True, sizes="network"),
    "log2": activation(logarithmic=True),
    "surgery": replace(BASE, surgery=SurgeryConfig(split=True, scale_channels=4.0)),
    "budget": replace(BASE, mixed=MixedConfig(budget=6.0, images=1, steps=2)),
    "density": replace(BASE, selection=SelectionConfig(rule="density", images=2)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_does_not_depend_on_where_the_network_lives(
    name: str,
    network: nn.Module,
    data: CalibrationSet,
    on_second: Callable[[nn.Module], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_scales, "ITERATIONS", 3)  # every operation is slow on this device
    expected = calibrate(network, data, SETTINGS[name], timesteps=100)
    moved = on_second(network)
    plan = calibrate(moved, data, SETTINGS[name], timesteps=100)
    assert not any(
        isinstance(tensor, DeviceTensor) for q in plan.layers.values() for tensor in (q.codes, q.weight_scale)
    )
    equal = [torch.equal(plan.layers[n].codes, q.codes) for n, q in expected.layers.items()]
    assert plan.layers.keys() == expected.layers.keys()
    assert all(equal)
    x, t = data.inputs(slice(4))
    there = fake_quantized(moved, plan)(*replace(data, device=device_of(moved)).inputs(slice(4)))
    assert isinstance(there, DeviceTensor)
    assert torch.allclose(there.cpu(), fake_quantized(network, expected)(x, t), atol=1e-3)


@pytest.mark.parametrize("cache", Cache)
def test_recordings_may_lie_anywhere(
    cache: Cache, network: nn.Module, data: CalibrationSet, on_second: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    moved = on_second(network)
    data = replace(data, device=device_of(moved))
    store = SampleStore(folder=tmp_path, cache=cache, device=data.device)
    with open_recorder(moved, moved, data, 4, store) as recorder:
        io = recorder.record(Block(name="block", layers=("block.first",)))
        assert isinstance(io.target, DeviceTensor) == (cache in (Cache.AUTO, Cache.DEVICE))
        taken = io.take(torch.tensor([5, 0]))
    assert all(isinstance(tensor, DeviceTensor) for tensor in taken.tensors)


def test_gradients_of_a_plan_are_looked_into_where_the_network_lives(
    network: nn.Module, data: CalibrationSet, on_second: Callable[[nn.Module], nn.Module]
) -> None:
    moved = on_second(network)
    plan = calibrate(moved, data, SETTINGS["gac"], timesteps=100)
    samples = weight_samples(replace(data, device=device_of(moved)), plan.config, moved)
    quantized = fake_quantized(moved, plan, activations=False)
    result = next(block for block in plan.blocks if block.name == "block")
    with open_recorder(moved, quantized, samples.data, 4) as recorder:
        io = recorder.record(Block(name=result.name, layers=result.layers))
    agreement = diagnose.agreement(moved, plan, result, io.part(samples.train), samples.data.step[samples.train])
    alignment = diagnose.alignment(moved, plan, result, io.part(samples.train), io.part(samples.validation))
    assert agreement.after.between is not None
    assert len(alignment.inner) == len(samples.train)


def test_a_module_stays_where_it_is_when_a_copy_moves(
    network: nn.Module, on_second: Callable[[nn.Module], nn.Module]
) -> None:
    moved = on_second(network)
    assert all(isinstance(tensor, DeviceTensor) for tensor in (*moved.parameters(), moved.scale))
    assert not any(isinstance(tensor, DeviceTensor) for tensor in (*network.parameters(), network.scale))
    assert on_device(network, torch.device("cpu")) is network


def test_a_tensor_that_stays_behind_is_an_error(on_second: Callable[[nn.Module], nn.Module]) -> None:
    moved = on_second(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="on one device"):
        moved(torch.zeros(1, 2))
