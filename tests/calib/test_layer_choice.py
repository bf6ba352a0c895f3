"""The choice of layers: all of them at the configured bits, or by a budget, and what a budget may not do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from calib.config import FLOAT_BITS, ActivationConfig, MixedConfig, QuantConfig, WeightConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.float_layers import float_reasons
from calib.layer_choice import LayerChoice, choose_layers
from calib.progress import Progress, Stage
from calib.trace import trace

QUANTIZED = ["down", "gate", "mlp.0", "mlp.2", "shared"]  # of the foreign network


def samples() -> CalibrationSet:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    step = torch.arange(4).repeat_interleave(2)
    return CalibrationSet(x=x, t=90 - 20 * step, step=step)


def settings(**mixed: object) -> QuantConfig:
    return QuantConfig(
        weight=WeightConfig(bits=4, candidates=2), activation=ActivationConfig(batch=8), mixed=MixedConfig(**mixed)
    )


@pytest.fixture
def choose(make_foreign: Callable[[], nn.Module]) -> Callable[..., LayerChoice]:
    def choice(config: QuantConfig, seen: list[Progress] | None = None) -> LayerChoice:
        return choose_layers(
            make_foreign(),
            samples(),
            config,
            timesteps=100,
            clock=None,
            on_progress=(lambda progress: None) if seen is None else seen.append,
        )

    return choice


def test_without_a_budget_every_layer_that_can_be_has_the_configured_bits(choose, make_foreign) -> None:
    seen: list[Progress] = []
    choice = choose(settings(), seen)
    assert sorted(choice.layers) == QUANTIZED
    assert choice.bits == dict.fromkeys(choice.layers, 4)
    assert choice.float_reasons == float_reasons(trace(make_foreign(), (1, 8, 8), 100), "deploy")
    assert (choice.sensitivity, choice.products, seen) == (None, [], [])


def test_a_budget_decides_the_bits_within_it_and_reports_each_layer(choose, make_foreign) -> None:
    seen: list[Progress] = []
    choice = choose(settings(budget=5.0, choices=(4, 8)), seen)
    network = make_foreign()
    sizes = {name: network.get_submodule(name).weight.numel() for name in choice.layers}
    assert sum(sizes[name] * choice.bits[name] for name in sizes) <= 5.0 * sum(sizes.values())
    assert set(choice.bits.values()) == {4, 8}
    assert [(p.stage, p.name) for p in seen] == [(Stage.BITS, f"bits, layer {k}/5") for k in range(1, 6)]
    assert choice.sensitivity is not None
    assert sorted(choice.sensitivity) == QUANTIZED


def test_a_layer_that_the_budget_leaves_float_says_why(choose) -> None:
    choice = choose(settings(budget=20.0, choices=(4, FLOAT_BITS)))
    left = [name for name in QUANTIZED if choice.bits[name] == FLOAT_BITS]
    assert left
    assert sorted([*choice.layers, *left]) == QUANTIZED
    assert {choice.float_reasons[name] for name in left} == {"left float within the budget, since it matters most"}


def test_a_budget_with_room_for_every_layer_in_float_is_refused(choose) -> None:
    with pytest.raises(CalibError, match="The budget has room for every layer in float"):
        choose(settings(budget=32.0, choices=(4, FLOAT_BITS)))
