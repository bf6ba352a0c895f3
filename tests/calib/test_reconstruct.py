"""Learning the rounding of a block: its losses by hand, the best rounding by brute force, and the final decision."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib import adaround, reconstruct
from calib.adaround import LayerWeight, initial_logits
from calib.blocks import Block, BlockIO
from calib.choices import Rounding
from calib.config import OmegaConfig, ReconstructionConfig
from calib.fitting import Fit, fit_rounding
from calib.reconstruct import BlockResult
from calib.records import parse_record

SCALE = 0.5


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def correlated(rows: int, columns: int) -> Tensor:
    """Return inputs whose columns nearly agree, so that errors of two weights cancel or add up."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, generator=g) + 0.2 * torch.randn(rows, columns, generator=g)


def recording(layer: nn.Module, x: Tensor) -> BlockIO:
    leaves, spec = pytree.tree_flatten(((x,), {}))
    with torch.no_grad():
        return BlockIO(inputs=tuple(leaves), batched=(True,), spec=spec, target=layer(x))


def layer_of(weight: Tensor) -> LayerWeight:
    return LayerWeight(key="weight", weight=weight, scale=torch.full((len(weight),), SCALE), bits=4)


WEIGHT = torch.tensor([[0.2, 0.7, -0.3, 0.8]])  # to nearest: 0.0, 0.5, -0.5, 1.0
BLOCK = Block(name="layer", layers=("layer",))


def error_of(codes: Tensor, x: Tensor) -> float:
    return float((x @ (codes * SCALE - WEIGHT).T).square().mean())


def test_the_loss_of_an_image_is_summed_over_channels_and_averaged_over_pixels() -> None:
    out, target = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    out[0, 0, 0, 0], out[0, 2, 1, 1], out[1] = 2.0, 4.0, 1.0
    assert reconstruct.output_loss(out, target).tolist() == [(4 + 16) / 4, 3.0]
    assert reconstruct.output_loss(out[:, :, 0, 0], target[:, :, 0, 0]).tolist() == [4.0, 3.0]


def test_the_loss_of_a_block_is_that_of_a_module_with_those_weights() -> None:
    x, other = correlated(8, 4), torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    layer = linear(WEIGHT)
    losses = reconstruct.block_loss(layer, [layer_of(WEIGHT)], [other], recording(layer, x))
    assert torch.allclose(losses, (x @ (other - WEIGHT).T).square().sum(1), atol=1e-6)
    assert torch.equal(layer.weight, WEIGHT)


def test_learning_finds_a_rounding_nearly_as_good_as_the_best_of_all() -> None:
    layer, x = linear(WEIGHT), correlated(64, 4)
    io = recording(layer, x)
    ups = itertools.product((0, 1), repeat=4)
    best = min(error_of(torch.floor(WEIGHT / SCALE) + torch.tensor([up]), x) for up in ups)
    calls: list[int] = []
    fit = Fit(
        omega=OmegaConfig(rule="uniform"),
        settings=ReconstructionConfig(iterations=300, batch=32, learning_rate=0.1, regulariser=0.1),
        scores=torch.zeros(64, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
        on_iteration=calls.append,
    )
    weights = [layer_of(WEIGHT)]
    start = [initial_logits(WEIGHT, weights[0].scale)]
    begin = list(zip(weights, start, strict=True))
    logits = fit_rounding(reconstruct.weight_loss(layer, weights), begin, io, fit)
    (codes,), result = reconstruct.harden(layer, BLOCK, weights, logits, io)
    assert best <= error_of(codes, x) < 1.5 * best
    assert error_of(torch.round(WEIGHT / SCALE), x) > 10 * best
    assert result.rounding is Rounding.ADAROUND
    assert result.loss_after == pytest.approx(error_of(codes, x), rel=1e-4)
    assert calls == list(range(1, 301))


def test_a_rounding_that_is_worse_than_nearest_is_not_taken() -> None:
    layer, x = linear(WEIGHT), correlated(64, 4)
    weights = [layer_of(WEIGHT)]
    up = [torch.full_like(WEIGHT, 5.0)]  # everything up, so that no errors cancel
    (codes,), result = reconstruct.harden(layer, BLOCK, weights, up, recording(layer, x))
    assert torch.equal(codes, torch.round(WEIGHT / SCALE).to(torch.int8))
    assert result.rounding is Rounding.NEAREST
    assert result.loss_before == result.loss_after == pytest.approx(error_of(codes, x), rel=1e-4)


def test_the_weights_of_a_block_are_copies_in_the_order_of_its_layers() -> None:
    block = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    names = ("net.2", "net.0")
    scales = {name: torch.ones(size) for name, size in zip(names, (2, 3), strict=True)}
    weights = reconstruct.layer_weights(block, Block(name="net", layers=names), scales, {"net.2": 4, "net.0": 8})
    assert [(w.key, w.bits, tuple(w.weight.shape)) for w in weights] == [
        ("2.weight", 4, (2, 3)),
        ("0.weight", 8, (3, 2)),
    ]
    weights[0].weight.zero_()
    assert bool(block[2].weight.any())


def test_a_result_is_read_back_from_json() -> None:
    result = BlockResult(name="a", layers=("a.b", "a.c"), loss_before=2.0, loss_after=None, rounding=Rounding.NEAREST)
    assert parse_record(BlockResult, json.dumps(asdict(result)), "here", "Again") == result


class Gated(nn.Module):
    """Two convolutions of one input, one of which gates the other, and a third."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.b, self.out = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.a(x) * torch.sigmoid(self.b(x)))
        return out


def test_the_fine_loss_adds_those_of_the_layers_but_the_last() -> None:
    block, float_block = Gated(0), Gated(1)
    x, f = torch.randn(2, 4, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    io = replace(recording(float_block, f), inputs=(x,), reference=(f,))
    names = ("second.a", "second.b", "second.out")
    scales = {name: torch.full((4,), 0.1) for name in names}
    layers = reconstruct.layer_weights(block, Block(name="second", layers=names), scales, dict.fromkeys(names, 4))
    logits = [torch.zeros_like(w.weight) for w in layers]
    expected = reconstruct.of_logits(reconstruct.weight_loss(block, layers), layers)(logits, io)
    for i, name in enumerate("ab"):
        soft = adaround.soft_weight(layers[i].weight, layers[i].scale, logits[i], 4)
        out = nn.functional.conv2d(x, soft, block.get_submodule(name).bias)
        expected = expected + 0.5 * reconstruct.output_loss(out, float_block.get_submodule(name)(f))
    fine = reconstruct.of_logits(reconstruct.fine_grained_loss(block, float_block, layers, 0.5), layers)(logits, io)
    assert torch.allclose(fine, expected, rtol=1e-5)
