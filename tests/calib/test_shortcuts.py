"""Shortcuts by structure: those that diffusers names so, in every model of the table, and those of other networks."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.choices import Convention
from calib.config import SurgeryConfig
from calib.data import CalibrationSet
from calib.float_layers import float_reasons
from calib.shortcuts import follow
from calib.surgery import apply_surgery, plan_surgery
from calib.trace import trace
from gaq_export.models import architectures
from gaq_export.models.architectures import EpsilonModel, condition_inputs_of
from gaq_export.models.registry import MODELS, reduced


def network(name: str) -> tuple[EpsilonModel, tuple[int, int, int]]:
    """Return a model of the table at reduced width, with random weights, and the shape of its images."""
    config = dict(reduced(MODELS[name]).config)
    kind = config.pop("_class_name")
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = (getattr(architectures, kind, None) or getattr(diffusers, kind))(**fields).eval()
    return EpsilonModel(unet), (fields["in_channels"], fields["sample_size"], fields["sample_size"])


@pytest.mark.parametrize("name", MODELS)
def test_structure_finds_what_diffusers_calls_shortcuts_and_downsamplers(name: str) -> None:
    model, shape = network(name)
    traced = trace(model, shape, 1000, condition_inputs_of(model.unet))
    named = [
        replace(
            layer,
            shortcut=any(word in layer.name for word in ("shortcut", "skip")),
            downsampling="downsample" in layer.name,
        )
        for layer in traced.layers
    ]
    assert [layer.shortcut for layer in traced.layers] == [layer.shortcut for layer in named]
    reasons = float_reasons(traced, Convention.TFMQ)
    assert list(reasons.items()) == list(float_reasons(replace(traced, layers=tuple(named)), Convention.TFMQ).items())
    assert any(reason == "first time-embedding layer (TFMQ-DM)" for reason in reasons.values())


class Residual(nn.Module):
    """A residual block whose layers have other names; `way` says how its input gets to the sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(4, 8, 1)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.d = nn.Linear(4, 8)
        self.t = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)))
        if self.way == "convolution":
            return h + self.c(x)
        if self.way == "in place, scaled":
            h += functional.dropout(self.c(x), 0.1, training=False)
            return h / 2**0.5
        if self.way == "linear":
            return self.d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + h
        if self.way == "around one":
            return self.wide(x) + self.c(x)
        if self.way == "3x3":
            return h + self.wide(x)
        if self.way == "time":
            return h + self.t(t[:, None] / 100)[:, :, None, None]
        if self.way == "multiplied":
            return h * self.c(x)
        z = self.c(x)
        return z + self.b(torch.relu(z))  # after it, not around it


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.enter, self.block, self.leave = nn.Conv2d(1, 4, 3, padding=1), Residual(way), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.leave(self.block(self.enter(x), t))
        return out


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("convolution", {"block.c"}),
        ("in place, scaled", {"block.c"}),
        ("linear", {"block.d"}),
        ("around one", {"block.c"}),
        ("3x3", set()),
        ("time", set()),
        ("multiplied", set()),
        ("after", set()),
    ],
)
def test_a_shortcut_is_known_whatever_its_name(way: str, expected: set[str]) -> None:
    traced = trace(Net(way), (1, 8, 8), 100)
    assert {layer.name for layer in traced.layers if layer.shortcut} == expected
    reasons = float_reasons(traced, Convention.TFMQ)
    assert {name for name, reason in reasons.items() if reason == "shortcut (TFMQ-DM)"} == expected


def test_a_stride_is_down_sampling_whatever_its_name(make_foreign) -> None:
    reasons = float_reasons(trace(make_foreign(), (1, 8, 8), 100), Convention.TFMQ)
    assert reasons["down"] == "down-sampling (TFMQ-DM)"
    assert "gate" not in reasons


def test_a_residual_stream_of_linear_layers_has_no_shortcuts() -> None:
    class Stream(nn.Module):
        """Tokens, embedded by a linear layer, to which each block adds; attention in the first, a perceptron after."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(4, 6), nn.Linear(6, 4)
            self.v, self.project, self.up, self.down = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 9),
                nn.Linear(9, 6),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            v = self.v(h)
            h = h + self.project(functional.scaled_dot_product_attention(v, v, v))
            h = h + self.down(functional.gelu(self.up(h)))
            out: Tensor = self.out(h)
            return out

    model, x = Stream(), torch.randn(2, 5, 4)
    with follow(model, x) as flow:
        model(x)
    assert flow.shortcuts() == frozenset()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_shortcut_that_surgery_cut_in_two_is_still_one() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
            self.a, self.s, self.leave = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 1, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = torch.cat([self.one(x), self.two(x)], 1)
            out: Tensor = self.leave(self.a(h) + self.s(h))
            return out

    step = torch.arange(4) // 2
    data = CalibrationSet(x=torch.randn(4, 1, 8, 8), t=step * 10, step=step)
    whole = Joined().eval()
    halves = apply_surgery(whole, plan_surgery(whole, data, SurgeryConfig(split=True)))
    for model, expected in ((whole, {"s"}), (halves, {"s.first", "s.second"})):
        traced = trace(model, (1, 8, 8), 100)
        assert {layer.name for layer in traced.layers if layer.shortcut} == expected
