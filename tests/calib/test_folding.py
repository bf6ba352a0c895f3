"""Computed weights and batch norms become plain weights, and the network computes what it did."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from calib.folding import fold_batch_norms, fold_weights


class Net(nn.Module):
    """Two convolutions with a batch norm behind each, the second of which another reader keeps apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.other = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(torch.relu(self.norm(self.one(x))))
        return self.other(h) + h


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_computed_weight_becomes_a_plain_one_in_a_copy(norm: Callable[[nn.Module], nn.Module]) -> None:
    net = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), norm(nn.Conv2d(4, 2, 3))))
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    names, expected = list(net.state_dict()), net(x)
    folded = fold_weights(net)
    assert torch.allclose(folded(x), expected, atol=1e-6)
    assert type(folded[1]) is nn.Conv2d
    assert list(folded[1].state_dict()) in (["weight", "bias"], ["bias", "weight"])
    assert folded[0].weight.data_ptr() == net[0].weight.data_ptr()
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), expected)


def test_a_batch_norm_that_alone_reads_a_layer_is_folded_into_it() -> None:
    net = seeded(Net)
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = net(x)
    folded = fold_batch_norms(net, (x,))
    assert torch.allclose(folded(x), expected, atol=1e-5)
    assert isinstance(folded.norm, nn.Identity)
    assert isinstance(folded.other, nn.BatchNorm2d)  # its input is read past it too
    assert torch.equal(folded.two.weight, net.two.weight)
    assert torch.equal(net(x), expected)


def test_a_network_without_any_of_that_is_returned_itself() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_weights(net) is net
    assert fold_batch_norms(net, (torch.zeros(2, 2, 8, 8),)) is net
