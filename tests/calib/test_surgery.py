"""The rewritten network computes what the float one does, and its parts have separate grids."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import OmegaConfig, QuantConfig, ReconstructionConfig, SurgeryConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import load_plan, save_plan
from calib.surgery import Surgery, apply_surgery, channel_factors, find_concatenations, plan_surgery


class _Net(nn.Module):
    """A shortcut that reads a small and a hundred times larger image side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.shortcut, self.inner = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 4, 3, stride=1, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.head(x + t.reshape(-1, 1, 1, 1) / 100)
        joined = torch.cat([h, 100 * h.repeat(1, 2, 1, 1)[:, :6]], dim=1)
        stacked = torch.cat([h, h], dim=0)[: len(h)]  # joins images, not channels
        out: Tensor = self.tail(self.shortcut(joined) + self.inner(stacked))
        return out


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Net().eval()


def _data() -> CalibrationSet:
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    step = torch.arange(4).repeat_interleave(4)
    return CalibrationSet(x=x * (1 + step.reshape(-1, 1, 1, 1)), t=95 - 20 * step, step=step)


def _config(surgery: SurgeryConfig) -> QuantConfig:
    return QuantConfig(
        reconstruction=ReconstructionConfig(iterations=2, batch=4),
        omega=OmegaConfig(rule="uniform"),
        micro_batch=4,
        surgery=surgery,
    )


def test_a_convolution_of_a_concatenation_is_found(net: nn.Module) -> None:
    assert find_concatenations(net, _data()) == {"shortcut": 4}


@pytest.mark.parametrize(
    "surgery",
    [
        Surgery(splits={"shortcut": 4}),
        Surgery(factors={"inner": torch.tensor([1.0, 2.0, 0.5, 8.0])}),
        Surgery(splits={"shortcut": 4}, factors={"shortcut.second": torch.arange(1.0, 7.0)}),
    ],
)
def test_rewriting_changes_nothing_that_is_computed(net: nn.Module, surgery: Surgery) -> None:
    data, before = _data(), {name: value.clone() for name, value in net.state_dict().items()}
    rewritten = apply_surgery(net, surgery)
    with torch.no_grad():
        assert torch.allclose(rewritten(data.x, data.t), net(data.x, data.t), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert apply_surgery(rewritten, surgery).state_dict().keys() == rewritten.state_dict().keys()
    assert apply_surgery(net, Surgery()) is net


def test_the_factors_are_the_papers(net: nn.Module) -> None:
    """Four steps of one sample each: a channel's largest value over the smallest channel's, weighted by it."""
    data = _data().take(torch.tensor([0, 4, 8, 12]))
    factors = channel_factors(net, data, SurgeryConfig(scale_channels=1e6))
    assert factors.keys() == {"shortcut", "inner"}
    with torch.no_grad():
        m = net.head(data.x + data.t.reshape(-1, 1, 1, 1) / 100).abs().amax((2, 3)).double()  # (steps, channels)
    expected = (m / m.amin(1, keepdim=True) * m).sum(0) / m.sum(0)
    assert torch.allclose(factors["inner"].double(), expected, rtol=1e-4)
    capped = channel_factors(net, data, SurgeryConfig(scale_channels=1.5))
    assert float(capped["inner"].max()) <= 1.5


def test_a_plan_of_the_rewritten_network_is_read_back_and_used(net: nn.Module, tmp_path: Path) -> None:
    data = _data()
    wanted = SurgeryConfig(split=True, scale_channels=4.0)
    plan = calibrate(net, data, _config(wanted), timesteps=100)
    assert plan.layers.keys() == {"shortcut.first.layer", "shortcut.second.layer", "inner.layer"}
    small, large = (plan.layers[f"shortcut.{part}.layer"].input.scale for part in ("first", "second"))
    assert large > 20 * small
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again.surgery.splits == plan.surgery.splits
    assert all(torch.equal(v, plan.surgery.factors[name]) for name, v in again.surgery.factors.items())
    with torch.no_grad():
        assert torch.equal(fake_quantized(net, again)(data.x, data.t), fake_quantized(net, plan)(data.x, data.t))


def test_splitting_keeps_the_small_part_of_a_concatenation(net: nn.Module) -> None:
    data, errors = _data(), {}
    for split in (False, True):
        plan = calibrate(net, data, _config(SurgeryConfig(split=split)), timesteps=100)
        with torch.no_grad():
            errors[split] = float((fake_quantized(net, plan)(data.x, data.t) - net(data.x, data.t)).square().mean())
    assert errors[True] < errors[False]
    assert plan_surgery(net, data, SurgeryConfig()) == Surgery()
