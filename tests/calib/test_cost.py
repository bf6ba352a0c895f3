"""What a quantized network costs on paper, against counts by hand."""

import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.cost import bit_operations, layer_macs, weight_bytes
from calib.data import CalibrationSet


class _Net(nn.Module):
    """Three convolutions; the middle one runs on a quarter of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 6, 2, stride=2),
            nn.Conv2d(6, 4, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        small = self.last(self.middle(self.first(x + 0 * t.reshape(-1, 1, 1, 1))))
        return nn.functional.pixel_shuffle(small, 2)


def test_costs_by_hand() -> None:
    net = _Net().eval()
    macs = layer_macs(net, (1, 8, 8), 100)
    assert macs == {"first": 64 * 4 * 9, "middle": 16 * 6 * 16, "last": 16 * 4 * 6}
    step = torch.arange(2).repeat_interleave(4)
    data = CalibrationSet(x=torch.randn(8, 1, 8, 8), t=90 - 50 * step, step=step)
    config = QuantConfig(
        weight=WeightConfig(bits=4),
        reconstruction=ReconstructionConfig(iterations=0),
        omega=OmegaConfig(rule="uniform"),
    )
    plan = calibrate(net, data, config, timesteps=100)
    assert list(plan.layers) == ["middle"]
    assert bit_operations(macs, plan) == (macs["first"] + macs["last"]) * 1024 + macs["middle"] * 4 * 8
    floats = (4 * 9 + 4) + 6 + (6 * 4 + 4)  # first, the bias of the middle, last
    assert weight_bytes(net, plan) == 4 * floats + 6 * 16 // 2 + 6 * 4


def test_every_layer_of_a_conditional_network_has_multiplications(
    conditional: tuple[nn.Module, CalibrationSet],
) -> None:
    network, samples = conditional
    macs = layer_macs(network, (1, 8, 8), 100, samples.cond)
    assert all(macs.values())
