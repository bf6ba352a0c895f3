"""The temporal block: cut out so that it computes what the network does, learned first and as one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.float_layers import float_reasons
from calib.plan import QuantPlan, save_plan
from calib.progress import Progress
from calib.temporal import NAME, find_block
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel

STEPS = torch.arange(6).repeat_interleave(4)


def config(*, rule: str = "uniform", iterations: int = 5, **more: Any) -> QuantConfig:
    return QuantConfig(
        weight=WeightConfig(bits=3),
        activation=ActivationConfig(batch=8),
        reconstruction=ReconstructionConfig(iterations=iterations, batch=8, learning_rate=1e-2),
        omega=OmegaConfig(rule=rule, meta_steps=2, batch=8, validation_batch=2),
        micro_batch=8,
        **{"convention": "tfmq"} | more,
    )


def noise(size: int) -> CalibrationSet:
    """Return 24 samples, four at each of six steps, of which one validates."""
    x = torch.randn(24, 1, size, size, generator=torch.Generator().manual_seed(2))
    return CalibrationSet(x=x, t=95 - 18 * STEPS, step=STEPS)


def outputs(network: nn.Module, names: Sequence[str], data: CalibrationSet) -> Tensor:
    """Return what every call of the layers `names` gave, (N, sum of their sizes), in the order of the calls."""
    seen: list[Tensor] = []
    handles = [
        network.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        for name in names
    ]
    with torch.no_grad():
        network(data.x, data.t)
    for handle in handles:
        handle.remove()
    return torch.cat([out.flatten(1) for out in seen], 1)


def projections(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules() if name.endswith("time_emb_proj")]


class Awkward(nn.Module):
    """Whatever makes a graph hard to cut: layers called twice, in-place changes, sizes of x, constants, no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 8)
        self.twice = nn.Linear(8, 8)
        self.after = nn.Conv1d(1, 2, 3)
        self.float_end = nn.Linear(8, 8)
        self.places = nn.Embedding(4, 8)
        self.constant = nn.Linear(8, 8)
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.act(self.first(torch.zeros_like(x[:, 0, 0, :1]) + t[:, None] / 100))
        h = self.twice(self.twice(h))
        y = self.enter(x) + h[:, :, None, None]
        h.relu_()  # what follows sees the changed value, and what was added above did not
        y = y * self.after(h[:, None]).mean((1, 2))[:, None, None, None]  # (N, 2, 6) -> (N, 1, 1, 1)
        y = y + self.float_end(h)[:, :, None, None]
        y = y + self.constant(self.places(torch.arange(4))).mean(0)[:, None, None]
        out: Tensor = self.leave(y)
        return out


@pytest.fixture(scope="module")
def awkward() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Awkward().eval()


def test_the_block_of_a_unet_gives_what_its_embedding_projections_give(tiny_unet) -> None:
    network, data = EpsilonModel(tiny_unet), noise(16)
    traced = trace(network, (1, 16, 16), 100)
    quantized = [layer.name for layer in traced.layers if layer.name not in float_reasons(traced, "tfmq")]
    (block,) = find_block(network, traced, quantized, (1, 16, 16))
    names = projections(network)
    assert set(block.layers) == {"unet.time_embedding.linear_2", *names}
    assert {f"{name}.weight" for name in block.layers} <= {name for name, _ in block.module.named_parameters()}
    called = [name for name in block.layers if name in names]
    assert torch.allclose(block.module(data.t), outputs(network, called, data), atol=1e-6)


def test_the_block_of_a_foreign_network_is_found_by_structure(make_foreign) -> None:
    network, data = make_foreign(), noise(8)
    state = torch.get_rng_state()
    (block,) = find_block(network, trace(network, (1, 8, 8), 100), ["time.2", "down", "gate"], (1, 8, 8))
    assert block.layers == ("time.2",)
    assert torch.allclose(block.module(data.t), outputs(network, ["time.2"], data), atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cut_keeps_what_was_computed_however_the_network_is_written(awkward) -> None:
    data, traced = noise(8), trace(awkward, (1, 8, 8), 100)
    (block,) = find_block(awkward, traced, ["twice", "after", "constant", "enter"], (1, 8, 8))
    assert block.layers == ("twice", "after")
    # The output of the first call goes to the second.
    expected = outputs(awkward, ["twice", "after", "float_end"], data)[
        :, 8:
    ]  # the first call's output goes to the second
    assert torch.allclose(block.module(data.t), expected, atol=1e-6)


def test_float_layers_behind_a_quantized_one_are_what_is_compared(awkward) -> None:
    data, traced = noise(8), trace(awkward, (1, 8, 8), 100)
    (block,) = find_block(awkward, traced, ["first"], (1, 8, 8))
    assert block.layers == ("first",)
    assert block.module(data.t).shape == (len(data), 8 + 12 + 8)


def test_its_loss_is_the_sum_over_all_projections_and_learning_lowers_it(tiny_unet) -> None:
    network, data = EpsilonModel(tiny_unet), noise(16)
    settings = config(iterations=60, keep_float=("*attentions*", "*up_blocks*conv*"))  # the rest has no part in it
    plan = calibrate(network, data, settings, timesteps=100)
    block, names = plan.blocks[0], projections(network)
    error = outputs(fake_quantized(network, plan, activations=False), names, data) - outputs(network, names, data)
    by_hand = error.square().sum(1).mean()  # three of each step's four samples train, and all four are alike
    assert (block.name, block.rounding) == (NAME, "adaround")
    assert block.loss_after == pytest.approx(float(by_hand), rel=1e-4)
    assert block.loss_after < 0.95 * block.loss_before
    assert [name for b in plan.blocks for name in b.layers if "time_emb" in name] == list(block.layers)
    assert sorted(name for b in plan.blocks for name in b.layers) == sorted(plan.layers)


def test_without_quantized_layers_that_depend_on_the_step_there_is_none(make_foreign, awkward) -> None:
    assert find_block(awkward, trace(awkward, (1, 8, 8), 100), ["constant", "enter"], (1, 8, 8)) == []
    network = make_foreign()
    assert find_block(network, trace(network, (1, 8, 8), 100), ["down", "gate"], (1, 8, 8)) == []
    plan = calibrate(network, noise(8), config(convention="deploy"), timesteps=100)
    assert NAME not in {b.name for b in plan.blocks}


class Stop(Exception):
    pass


def test_it_comes_first_and_a_killed_calibration_continues_to_the_same_bytes(make_foreign, tmp_path: Path) -> None:
    def quantize(on_progress: Callable[[Progress], None], **more: Path) -> QuantPlan:
        return calibrate(make_foreign(), noise(8), config(rule="gac"), timesteps=100, on_progress=on_progress, **more)

    def saved(plan: QuantPlan) -> bytes:
        save_plan(plan, tmp_path / "plan.safetensors")
        return (tmp_path / "plan.safetensors").read_bytes() + (tmp_path / "plan.json").read_bytes()

    def kill(progress: Progress) -> None:
        if progress.result is not None:
            raise Stop

    seen: list[Progress] = []
    undisturbed = saved(quantize(seen.append))
    assert [p.name for p in seen if p.result is not None] == [NAME, "gate", "mlp"]  # `down` has a stride: float
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    with pytest.raises(Stop):
        quantize(kill, folder=tmp_path / "blocks")
    seen.clear()
    assert saved(quantize(seen.append, folder=tmp_path / "blocks")) == undisturbed
    assert [p.resumed for p in seen if p.result is not None] == [True, False, False]


def test_a_network_that_torch_cannot_export_is_refused_in_one_line(make_foreign, capfd) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_foreign()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.inner(x, t) if float(t.float().mean()) >= 0 else x
            return out

    with pytest.raises(
        CalibError, match=r"torch.export cannot take .+ out of this network: .+ Use --convention deploy"
    ):
        calibrate(Branching(), noise(8), config(), timesteps=100)
    assert capfd.readouterr() == ("", "")
