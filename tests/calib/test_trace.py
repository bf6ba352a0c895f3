"""What one pass of a network shows of its layers, and which of them read the same tensor."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.errors import CalibError
from calib.trace import group_by_input, trace


class Pieces(nn.Module):
    """Layers that read x, t, both or one tensor twice, one that is called twice and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.a, self.b, self.twice, self.bypassed = (nn.Linear(4, 4) for _ in range(5))
        self.coarse = nn.Conv2d(1, 1, 3, stride=2, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.step(t[:, None].float().expand(-1, 4))  # (N,) -> (N, 4)
        y = self.twice(self.twice(self.a(x) + self.b(x) + h[:, None, None]))
        y = y + functional.interpolate(self.coarse(x), scale_factor=2.0)
        return functional.linear(y, self.bypassed.weight)


def test_layers_are_listed_in_call_order_with_what_decides_their_input() -> None:
    torch.manual_seed(0)
    layers = {layer.name: layer for layer in trace(Pieces(), (1, 4, 4), 100).layers}
    assert list(layers) == ["step", "a", "b", "twice", "coarse", "bypassed"]
    assert {name: layer.calls for name, layer in layers.items()} == {
        "step": 1,
        "a": 1,
        "b": 1,
        "twice": 2,
        "coarse": 1,
        "bypassed": 0,
    }
    assert [name for name, layer in layers.items() if layer.by_step] == ["step"]
    assert [name for name, layer in layers.items() if not layer.depends_on_x] == ["step"]
    assert [name for name, layer in layers.items() if layer.downsampling] == ["coarse"]


def test_layers_that_read_one_tensor_are_a_group_and_one_called_twice_is_alone() -> None:
    torch.manual_seed(0)
    traced = trace(Pieces(), (1, 4, 4), 100)
    assert group_by_input(traced, ["b", "twice", "a", "coarse"]) == [("a", "b", "coarse"), ("twice",)]
    assert group_by_input(traced, ["b", "twice"]) == [("b",), ("twice",)]


def test_a_network_with_another_output_shape_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x[:, :, 1:]

    with pytest.raises(CalibError, match=r"input's shape \(3, 1, 8, 8\); found \(3, 1, 7, 8\)"):
        trace(Wrong(), (1, 8, 8), 100)
