"""Attention taken to pieces: the same numbers, and each operand open to be seen and replaced."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.attention import OPERANDS, intercept_attention
from calib.calibrate import calibrate
from calib.config import ActivationConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.float_layers import float_reasons, quantized_products
from calib.trace import trace


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, 0.5 * x, x + 1, **self.options)


class Net(nn.Module):
    """Linear, attention within each image's channels, linear, linear; for images as wide as `width`."""

    def __init__(self, width: int = 4, **options: object) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(width, width) for _ in range(3))
        self.attention = Attention(**options)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.attention(self.first(x))))
        return out


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}])
def test_in_pieces_it_is_what_pytorch_computes_at_once(options: dict[str, object]) -> None:
    module, seen = Attention(**options), dict[str, Tensor]()

    def note(name: str, operand: Tensor) -> Tensor:
        seen[name] = operand
        return operand

    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    handles = intercept_attention(module, note)
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert tuple(seen) == ("query", "key", "probability", "value")
    assert torch.allclose(seen["probability"].sum(-1), torch.ones(2, 3, 5))
    seen.clear()
    functional.scaled_dot_product_attention(x, x, x)  # not in the module
    for handle in handles:
        handle.remove()
    module(x)
    assert seen == {}


def test_a_module_that_fails_leaves_attention_as_it_was() -> None:
    module = Attention()
    intercept_attention(module, lambda name, operand: operand.zero_())
    with pytest.raises(TypeError):
        module(None)
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(functional.scaled_dot_product_attention(x, x, x), x)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}])
def test_attention_with_a_mask_stays_float_and_says_so(options: dict[str, object]) -> None:
    traced = trace(Net(**options), (2, 6, 4), 10)
    assert traced.attentions == {"attention": False}
    reasons = float_reasons(traced, "tfmq")
    assert reasons["attention"] == "attention with a mask or other options"
    assert quantized_products(traced, "tfmq", reasons) == []
    module = Attention(**options)
    intercept_attention(module, lambda name, operand: operand)
    with pytest.raises(CalibError, match="mask or other options"):
        module(torch.ones(1, 1, 6, 6))


def test_only_the_papers_convention_quantizes_products_and_keep_float_keeps_them() -> None:
    traced = trace(Net(), (2, 6, 4), 10)
    for convention, keep_float, expected in (
        ("deploy", (), []),
        ("tfmq", (), ["attention"]),
        ("tfmq", ("attent*",), []),
    ):
        reasons = float_reasons(traced, convention, keep_float)
        assert quantized_products(traced, convention, reasons) == expected
    with pytest.raises(CalibError, match="'attent\\*' matches no layer"):
        float_reasons(traced, "deploy", ("attent*",))


def test_attention_of_operands_without_a_batch_axis_is_not_plain() -> None:
    class Flat(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1), t).unflatten(0, x.shape[:2])

    assert trace(Flat(), (2, 6, 4), 10).attentions == {"attention": False}


@pytest.mark.parametrize("per_step", [False, True])
def test_quantized_products_are_those_of_the_rounded_operands(per_step: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = Net(), torch.randn(8, 2, 6, 4)
    t = torch.arange(8) // 4
    x[4:] *= 3
    config = QuantConfig(
        convention="tfmq",
        activation=ActivationConfig(bits=5, rule="minmax", per_step=per_step),
        reconstruction=ReconstructionConfig(iterations=0),
    )
    plan = calibrate(network, CalibrationSet(x=x, t=t, step=t), config, timesteps=2)
    product = plan.products["attention"]
    fake, seen = fake_quantized(network, plan), dict[str, Tensor]()
    fake.attention.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    fake(x, t)
    operands = {"query": seen["x"] / 2, "key": 0.5 * seen["x"], "value": seen["x"] + 1}
    rounded = {}
    for name in (*operands, "probability"):
        if name == "probability":
            operands[name] = torch.softmax(rounded["query"] @ rounded["key"].mT, -1)
        low, high = (0, 255) if name == "probability" else (-16, 15)
        step_scale = torch.tensor(getattr(product, name).scale)
        if per_step:
            ratio = getattr(product, name).ratio
            assert max(ratio) == 1
            step_scale = (step_scale * torch.tensor(ratio))[t][:, None, None, None]
        rounded[name] = torch.round(operands[name] / step_scale).clamp(low, high) * step_scale
    assert torch.allclose(rounded["probability"] @ rounded["value"], seen["out"], atol=1e-5)
    assert not torch.allclose(operands["probability"] @ operands["value"], seen["out"], atol=1e-3)
    assert (product.query.ratio is not None and len(product.query.ratio) == 2) == per_step
    assert set(OPERANDS) == set(operands)
