"""GPTQ's rounding: the textbook recursion, less error than nearest rounding, and a start that leans its way."""

import pytest
import torch
from torch import Tensor, nn

from calib import adaround, gptq
from calib.affine import quantize_weight, search_weight_scale
from calib.blocks import BlockIO
from calib.reconstruct import LayerWeight


def correlated(rows: int, columns: int) -> Tensor:
    """Return inputs (rows, columns) whose columns depend on each other, as patches of an image do."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    return torch.randn(rows, columns, generator=g) @ (torch.eye(columns) + 2 * mix)


def weight(channels: int, columns: int) -> Tensor:
    return torch.randn(channels, columns, generator=torch.Generator().manual_seed(1))


def test_one_column_is_rounded_to_nearest() -> None:
    w, scale = weight(16, 1), torch.full((16,), 0.3)
    assert torch.equal(gptq.round_columns(w, torch.eye(1), scale, 4), quantize_weight(w, scale, 4))


def test_uncorrelated_inputs_give_nearest_rounding() -> None:
    w = weight(8, 12)
    scale = search_weight_scale(w, 4)
    assert torch.equal(gptq.round_columns(w, torch.eye(12), scale, 4), quantize_weight(w, scale, 4))


def test_rounding_in_blocks_of_columns_is_the_plain_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(8, 40), correlated(500, 40)
    scale = search_weight_scale(w, 3)
    whole = gptq.round_columns(w, x.T @ x, scale, 3)
    monkeypatch.setattr(gptq, "COLUMNS", 7)
    assert torch.equal(gptq.round_columns(w, x.T @ x, scale, 3), whole)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_inputs_are_fitted_better_than_by_nearest_rounding(bits: int) -> None:
    w, x = weight(16, 30), correlated(400, 30)
    scale = search_weight_scale(w, bits)
    codes = gptq.round_columns(w, x.T @ x, scale, bits)
    nearest = quantize_weight(w, scale, bits)
    error, before = ((x @ (w - c * scale[:, None]).T).square().mean() for c in (codes, nearest))
    assert error < 0.8 * before
    assert codes.abs().max() <= 2 ** (bits - 1)


def test_a_column_that_is_never_used_does_no_harm() -> None:
    w, x = weight(4, 6), correlated(50, 6)
    x[:, 2] = 0
    scale = search_weight_scale(w, 4)
    assert gptq.round_columns(w, x.T @ x, scale, 4).shape == w.shape


class Pair(nn.Module):
    """A convolution, a grouped one that cannot be unfolded, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.grouped(torch.relu(self.first(x))).movedim(1, -1))
        return out


def test_a_blocks_layers_lean_towards_gptq_and_those_that_cannot_start_at_the_float_weight() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Pair()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        io = BlockIO(inputs=(x,), batched=(True,), spec=torch.utils._pytree.tree_structure(((x,), {})), target=block(x))
    layers = [
        LayerWeight(key=f"{n}.weight", weight=m.weight.detach(), scale=search_weight_scale(m.weight, 4), bits=4)
        for n, m in block.named_children()
    ]
    logits = gptq.gptq_logits(block, layers, io, torch.Generator().manual_seed(0))
    plain = [adaround.initial_logits(w.weight, w.scale) for w in layers]
    assert torch.equal(logits[1], plain[1])
    columns = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    codes = gptq.round_columns(layers[0].weight.flatten(1), columns.T @ columns, layers[0].scale, 4)
    assert (
        adaround.hard_codes(layers[0].weight, layers[0].scale, logits[0], 4) - codes.reshape(8, 3, 3, 3)
    ).abs().max() <= 1
    assert not torch.equal(logits[0], plain[0])
    assert not torch.equal(logits[2], plain[2])
    assert torch.equal(block.first.weight, layers[0].weight)
