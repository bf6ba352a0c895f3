"""Weights held as integers: the same bits as a copy of the network with those weights, in a fraction of its memory."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib import calibrate as story
from calib.affine import dequantize_weight
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import save_plan
from calib.shared_copy import copy_sharing_tensors, replace_weight_by_codes

CONFIG = QuantConfig(
    activation=ActivationConfig(batch=4),
    reconstruction=ReconstructionConfig(iterations=3, batch=4, start="gptq", activations="qdrop"),
    omega=OmegaConfig(meta_steps=1, batch=4, validation_batch=2),
    micro_batch=4,
)


@pytest.fixture(scope="module")
def data() -> CalibrationSet:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    step = torch.arange(4).repeat_interleave(2)
    return CalibrationSet(x=x, t=95 - 18 * step, step=step)


def write(layer: nn.Module, codes: Tensor, scale: Tensor) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").copy_(dequantize_weight(codes, scale))


def storages(network: nn.Module) -> dict[int, int]:
    """Return the bytes of what a network's tensors lie in, by address."""
    tensors = (*network.parameters(), *network.buffers())
    return {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}


def test_a_plan_has_the_bytes_that_a_copied_network_gives(
    make_foreign: Callable[[], nn.Module], data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = story.calibrate(make_foreign(), data, CONFIG, timesteps=100)
    monkeypatch.setattr(story, "copy_sharing_tensors", copy.deepcopy)
    monkeypatch.setattr(story, "replace_weight_by_codes", write)
    copied = story.calibrate(make_foreign(), data, CONFIG, timesteps=100)
    for name, plan in (("held", held), ("copied", copied)):
        save_plan(plan, tmp_path / f"{name}.safetensors")
    for suffix in ("safetensors", "json"):
        assert (tmp_path / f"held.{suffix}").read_bytes() == (tmp_path / f"copied.{suffix}").read_bytes()
    assert any(layer.codes.any() for layer in held.layers.values())


def test_a_quantized_network_adds_nothing_to_the_float_one_and_the_plan(
    make_foreign: Callable[[], nn.Module], data: CalibrationSet
) -> None:
    network = make_foreign()
    plan = story.calibrate(network, data, CONFIG, timesteps=100)
    fake = fake_quantized(network, plan)
    known = storages(network).keys() | {
        v.untyped_storage().data_ptr() for q in plan.layers.values() for v in (q.codes, q.weight_scale)
    }
    assert storages(fake).keys() <= known
    held = sum(q.codes.numel() for q in plan.layers.values())
    assert sum(storages(fake).values()) < sum(storages(network).values()) - 2 * held


def test_the_float_network_keeps_its_type_its_weights_and_no_gradients(
    make_foreign: Callable[[], nn.Module], data: CalibrationSet
) -> None:
    network = make_foreign()
    before = copy.deepcopy(network.state_dict())
    plan = story.calibrate(network, data, CONFIG, timesteps=100)
    fake_quantized(network, plan).double()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_a_held_weight_is_codes_times_scale_also_in_a_copy(kind: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    codes, scale = torch.tensor([[1, -2, 3], [4, 5, -6]]).to(kind), torch.tensor([0.5, 0.25])
    other = copy_sharing_tensors(layer)
    replace_weight_by_codes(other[0], codes, scale)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[0.5, -1.0, 1.5], [1.0, 1.25, -1.5]])
    expected = nn.functional.linear(x, weight, layer[0].bias)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(other)(x), expected)
    assert not torch.equal(layer(x), expected)
    assert isinstance(other[0], nn.Linear)
