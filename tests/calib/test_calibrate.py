"""Calibration as a whole: what it leaves alone, what it makes, and that an interruption costs nothing but time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

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
from gaq_export.models.architectures import EpsilonModel

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
