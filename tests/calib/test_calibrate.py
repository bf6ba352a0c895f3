"""Calibration as a whole: what it leaves alone, what it makes, and that an interruption costs nothing but time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from calib import affine
from calib.calibrate import calibrate
from calib.config import (
    ActivationConfig,
    OmegaConfig,
    QuantConfig,
    ReconstructionConfig,
    WeightConfig,
)
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, save_plan
from calib.progress import Progress
from calib.trace import group_by_input, trace
from gaq_export.models.architectures import EpsilonModel
from tests.calib.conditional import short

BLOCKS = ("down", "gate", "mlp")  # of the foreign network


def config(*, bits: int = 4, rule: str = "gac", seed: int = 0, iterations: int = 5, rate: float = 1e-2) -> QuantConfig:
    return QuantConfig(
        weight=WeightConfig(bits=bits),
        activation=ActivationConfig(batch=8),
        reconstruction=ReconstructionConfig(iterations=iterations, batch=8, learning_rate=rate),
        omega=OmegaConfig(rule=rule, meta_steps=2, batch=8, validation_batch=2),
        micro_batch=8,
        seed=seed,
    )


def noise(size: int) -> CalibrationSet:
    """Return 24 samples, four at each of six steps."""
    x = torch.randn(24, 1, size, size, generator=torch.Generator().manual_seed(2))
    step = torch.arange(6).repeat_interleave(4)
    return CalibrationSet(x=x, t=95 - 18 * step, step=step)


def saved(plan: QuantPlan, folder: Path) -> bytes:
    save_plan(plan, folder / "plan.safetensors")
    return (folder / "plan.safetensors").read_bytes() + (folder / "plan.json").read_bytes()


@pytest.fixture(scope="module")
def quantize(make_foreign: Callable[[], nn.Module]) -> Callable[..., QuantPlan]:
    """Return what calibrates the foreign network."""
    return lambda settings, **more: calibrate(make_foreign(), noise(8), settings, timesteps=100, **more)


@pytest.fixture(scope="module")
def undisturbed(quantize: Callable[..., QuantPlan], tmp_path_factory) -> bytes:
    return saved(quantize(config()), tmp_path_factory.mktemp("undisturbed"))


class Stop(Exception):
    pass


def stop_after(block: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.result is not None and progress.index == block:
            raise Stop

    return on_progress


def test_the_float_network_is_left_alone(make_foreign) -> None:
    network = make_foreign()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibrate(network, noise(8), config(), timesteps=100)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(quantize, undisturbed, tmp_path: Path) -> None:
    assert saved(quantize(config()), tmp_path) == undisturbed
    other = quantize(config(seed=1))
    same_settings = dataclasses.replace(other, config=config())
    assert saved(same_settings, tmp_path) != undisturbed


def test_the_callers_random_numbers_are_neither_used_nor_moved(quantize, undisturbed, tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.Generator().manual_seed(123)
    assert saved(quantize(config()), tmp_path) == undisturbed
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_uniform_weights_leave_the_scores_equal_and_gac_moves_them(quantize) -> None:
    assert len(torch.unique(quantize(config(rule="uniform")).scores)) == 1
    assert len(torch.unique(quantize(config(rule="gac")).scores)) > 1


def test_a_plan_names_every_layer_once(quantize) -> None:
    plan = quantize(config())
    assert set(plan.layers) == {"down", "gate", "mlp.0", "mlp.2", "shared"}
    assert plan.float_layers["up"] == "ConvTranspose2d has no quantized form here"
    assert "attention.out_proj" in plan.float_layers
    assert [(b.name, b.rounding) for b in plan.blocks if b.loss_before is None] == [("shared", "nearest")]
    assert tuple(b.name for b in plan.blocks if b.loss_before is not None) == BLOCKS
    for layer in plan.layers.values():
        assert layer.codes.dtype == torch.int8
        assert layer.codes.min() >= -8
        assert layer.codes.max() <= 7
        assert min(layer.input.scale, layer.output_scale, float(layer.weight_scale.min())) > 0


def test_learning_never_makes_a_block_worse_than_nearest_rounding_and_helps_most(tiny_unet) -> None:
    settings = config(rule="uniform", iterations=30)
    plan = calibrate(EpsilonModel(tiny_unet), noise(16), settings, timesteps=100)
    learned = [b for b in plan.blocks if b.rounding == "adaround"]
    assert all(b.loss_after <= b.loss_before for b in plan.blocks)
    assert len(learned) > len(plan.blocks) / 2
    assert all(b.loss_after < b.loss_before for b in learned)


def test_no_iterations_round_everything_to_nearest_and_record_nothing(quantize, make_foreign, tmp_path: Path) -> None:
    seen: list[Progress] = []
    plan = quantize(config(rule="gac", iterations=0), folder=tmp_path / "blocks", on_progress=seen.append)
    assert {b.layers for b in plan.blocks} == {(name,) for name in plan.layers}
    assert {(b.rounding, b.loss_before, b.loss_after) for b in plan.blocks} == {("nearest", None, None)}
    for name, layer in plan.layers.items():
        weight = make_foreign().get_submodule(name).weight
        assert torch.equal(layer.codes, affine.quantize_weight(weight, layer.weight_scale, 4))
    assert len(torch.unique(plan.scores)) == 1
    assert {p.stage for p in seen} == {"ranges"}
    assert seen[-1].fraction == 1
    assert not (tmp_path / "blocks").exists()


def test_per_step_ranges_are_those_of_each_steps_own_samples(tiny_unet) -> None:
    network, data = EpsilonModel(tiny_unet), noise(16)
    activation = ActivationConfig(rule="minmax", batch=2, per_step=True, symmetric=True)
    settings = dataclasses.replace(config(iterations=0), activation=activation)
    plan = calibrate(network, data, settings, timesteps=100)
    assert plan.timesteps is not None
    assert plan.timesteps.tolist() == sorted(set(data.t.tolist()))
    fake = fake_quantized(network, plan, activations=False)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in plan.layers}
    for name in plan.layers:
        fake.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].abs().max()))
    for t in plan.timesteps:
        fake(data.x[data.t == t], data.t[data.t == t])
    for name, layer in plan.layers.items():
        assert layer.input.ratio is not None
        assert max(layer.input.ratio) == 1
        reach = 127 * layer.input.scale * torch.tensor(layer.input.ratio)
        assert torch.allclose(reach, torch.stack(seen[name]), rtol=1e-4)
    assert any(len({*(layer.input.ratio or ())}) == 6 for layer in plan.layers.values())


def test_learning_that_fails_falls_back_to_nearest_rounding(quantize) -> None:
    plan = quantize(config(rule="uniform", iterations=2, rate=100.0))  # decides every rounding at random
    fallen = [b for b in plan.blocks if b.loss_before is not None and b.rounding == "nearest"]
    assert fallen
    assert all(b.loss_after == b.loss_before for b in fallen)


def test_eight_bit_weights_are_much_closer_to_float_than_two_bit_ones(quantize, make_foreign) -> None:
    network, data = make_foreign(), noise(8)

    def error(bits: int) -> float:
        plan = quantize(config(bits=bits, rule="uniform"))
        with torch.no_grad():
            return float((fake_quantized(network, plan)(data.x, data.t) - network(data.x, data.t)).square().mean())

    assert error(8) < error(2) / 100


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_killed_calibration_continues_to_the_same_bytes(block: int, quantize, undisturbed, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize(config(), folder=tmp_path / "blocks", on_progress=stop_after(block))
    seen: list[Progress] = []
    plan = quantize(config(), folder=tmp_path / "blocks", on_progress=seen.append)
    assert saved(plan, tmp_path) == undisturbed
    assert [p.resumed for p in seen if p.result is not None] == [i <= block for i in range(len(BLOCKS))]
    worked = {p.name for p in seen if p.stage == "block" and p.result is None}
    assert worked == set(BLOCKS[block + 1 :])


def test_a_damaged_block_file_is_worked_out_again(quantize, undisturbed, tmp_path: Path) -> None:
    quantize(config(), folder=tmp_path / "blocks")
    file = tmp_path / "blocks" / "001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    seen: list[Progress] = []
    plan = quantize(config(), folder=tmp_path / "blocks", on_progress=seen.append)
    assert saved(plan, tmp_path) == undisturbed
    assert [p.resumed for p in seen if p.result is not None] == [True, False, True]


@pytest.mark.parametrize("change", ["seed", "weights", "samples"])
def test_blocks_of_another_calibration_are_not_taken(change: str, quantize, make_foreign, tmp_path: Path) -> None:
    quantize(config(), folder=tmp_path / "blocks")
    network, data, settings = make_foreign(), noise(8), config()
    if change == "seed":
        settings = config(seed=1)
    elif change == "weights":
        with torch.no_grad():
            network.enter.weight[0, 0, 0, 0] += 1e-3
    else:
        data.x[0, 0, 0, 0] += 1e-3
    seen: list[Progress] = []
    plan = calibrate(network, data, settings, timesteps=100, folder=tmp_path / "blocks", on_progress=seen.append)
    assert not any(p.resumed for p in seen)
    assert saved(plan, tmp_path) == saved(calibrate(network, data, settings, timesteps=100), tmp_path)


@pytest.mark.parametrize("resumed", [False, True])
def test_progress_rises_to_one(resumed: bool, quantize, tmp_path: Path) -> None:
    if resumed:
        with pytest.raises(Stop):
            quantize(config(), folder=tmp_path / "blocks", on_progress=stop_after(0))
    seen: list[Progress] = []
    quantize(config(), folder=tmp_path / "blocks", on_progress=seen.append)
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] > 0
    assert fractions[-1] == pytest.approx(1)
    assert {p.total for p in seen} == {len(BLOCKS)}
    assert seen[-1].stage == "ranges"


def test_a_folder_that_cannot_be_written_is_an_error(quantize, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CalibError, match=r"Cannot write .*blocks: .*Choose a folder you may write to"):
        quantize(config(), folder=tmp_path / "file" / "blocks")


def test_one_sample_is_too_few(make_foreign) -> None:
    data = noise(8).take(torch.arange(1))
    with pytest.raises(CalibError, match="There is one sample"):
        calibrate(make_foreign(), data, config(), timesteps=100)


def test_a_conditional_network_is_calibrated_with_its_conditions(
    conditional: tuple[EpsilonModel, CalibrationSet],
) -> None:
    network, samples = conditional
    plan = calibrate(network, samples, short(), timesteps=100)
    assert len(plan.layers) > 8
    other = {name: value.flip(0) for name, value in samples.cond.items()}
    odd = calibrate(
        network, CalibrationSet(x=samples.x, t=samples.t, step=samples.step, cond=other), short(), timesteps=100
    )
    assert any(plan.layers[name].input != odd.layers[name].input for name in plan.layers)
    with torch.no_grad():
        exact, quantized = (net(*samples.inputs()) for net in (network, fake_quantized(network, plan)))
    assert 0 < float((exact - quantized).square().sum() / exact.square().sum()) < 0.1


def test_a_label_is_not_taken_for_the_step(class_conditional: tuple[EpsilonModel, CalibrationSet]) -> None:
    network, samples = class_conditional
    layers = {layer.name: layer for layer in trace(network, (1, 8, 8), 100, samples.cond).layers}
    steps = [name for name, layer in layers.items() if layer.by_step]
    assert steps == ["unet.time_embedding.linear_1", "unet.time_embedding.linear_2"]
    for name in ("unet.down_blocks.0.resnets.0.time_emb_proj", "unet.class_embedding"):
        assert not layers[name].depends_on_x
    assert layers["unet.class_embedding"].kind == "Embedding"
    plan = calibrate(network, samples, short(convention="tfmq"), timesteps=100)
    (temporal,) = (block for block in plan.blocks if block.name == "(temporal)")
    assert temporal.layers == ("unet.time_embedding.linear_2",)  # the first stays float
    ends = {name for name, reason in plan.float_layers.items() if reason in ("first layer", "last layer")}
    assert ends == {"unet.conv_in", "unet.conv_out"}


THREE_STEPS = torch.arange(3).repeat_interleave(4)
GRID_RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ema": ({}, {}),
    "minmax": ({"rule": "minmax", "narrower": (4,)}, {}),
    "of each step": ({"per_step": True}, {}),
    "network": ({"per_step": True, "sizes": "network"}, {}),
    "qdrop": ({}, {"activations": "qdrop"}),
    "lsq": ({}, {"activations": "lsq", "activation_iterations": 2}),
}


def plan_of(network: nn.Module, rule: str, channels: int, **cond: Tensor) -> QuantPlan:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(12, channels, 8, 8, generator=drawn)
    data = CalibrationSet(x=x, t=90 - 20 * THREE_STEPS, step=THREE_STEPS, cond=cond)
    activation, reconstruction = GRID_RULES[rule]
    config = QuantConfig(
        weight=WeightConfig(candidates=2),
        activation=ActivationConfig(batch=4, **activation),
        reconstruction=ReconstructionConfig(iterations=2, batch=4, activation_learning_rate=1e-4, **reconstruction),
        omega=OmegaConfig(rule="uniform"),
        micro_batch=4,
    )
    return calibrate(network, data, config, timesteps=100)


@pytest.mark.parametrize("rule", GRID_RULES)
def test_q_k_and_v_share_their_grid(rule: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    states = torch.randn(12, 5, 12, generator=torch.Generator().manual_seed(3))
    plan = plan_of(EpsilonModel(unet.eval()), rule, 1, encoder_hidden_states=states)
    assert not plan.products  # float unless a convention asks
    attentions = {name.rpartition(".")[0] for name in plan.layers if name.endswith("to_q")}
    assert len(attentions) == 4
    grids = {name: (layer.input, *layer.narrower) for name, layer in plan.layers.items()}
    for attention in attentions:
        q, k, v = (grids[f"{attention}.to_{letter}"] for letter in "qkv")
        assert k == v
        assert (q == k) == attention.endswith("attn1")  # the other reads the text
    assert len({grids[f"{attention}.to_k"] for attention in attentions}) == 3  # the text is one, whoever reads it


class Odd(nn.Module):
    """An attention that is no block, because it is handed a dictionary: q, k and v are blocks by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, named: dict[str, Tensor]) -> Tensor:
        tokens = named["tokens"]
        return functional.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens * 2))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Conv2d(4, 4, 1), Odd(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x) * (1 + t.reshape(-1, 1, 1, 1) / 100)
        tokens = h.flatten(2).mT  # (N, C, H, W) -> (N, H*W, C)
        out: Tensor = self.leave(self.attention({"tokens": tokens}).mT.reshape(h.shape))
        return out


@pytest.mark.parametrize("rule", ["qdrop", "lsq"])
def test_q_and_k_share_their_grid_even_where_each_is_a_block_by_itself(rule: str) -> None:
    torch.manual_seed(0)
    network = Outer().eval()
    assert group_by_input(trace(network, (4, 8, 8), 100), ["attention.q", "attention.k", "attention.v"]) == [
        ("attention.q", "attention.k"),
        ("attention.v",),
    ]
    plan = plan_of(network, rule, 4)
    assert [block.name for block in plan.blocks] == ["attention.q", "attention.k", "attention.v"]
    q, k, v = (plan.layers[f"attention.{name}"].input for name in "qkv")
    assert q == k
    assert v != k
