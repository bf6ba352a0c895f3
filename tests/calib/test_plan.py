"""The plan on disk: to the bit what was calibrated, or an error that says what is wrong."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calib.config import QuantConfig, WeightConfig
from calib.errors import CalibError
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan, load_plan, pack_nibbles, save_plan, unpack_nibbles
from calib.reconstruct import BlockResult


def plan_of(bits: int = 4, seed: int = 0, per_step: bool = False) -> QuantPlan:
    """Return a plan of two layers with random codes that reach both ends of the grid; one has an odd count."""
    generator = torch.Generator().manual_seed(seed)

    def layer(*shape: int) -> LayerQuant:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, shape, generator=generator).to(torch.int8)
        codes.view(-1)[:2] = torch.tensor([low, high - 1])
        scale = torch.rand(shape[0], generator=generator)
        return LayerQuant(
            codes=codes,
            weight_scale=scale,
            weight_bits=bits,
            input=grid(),
            output_scale=1 / 3,
        )

    def grid(zero: int = 0) -> Grid:
        if not per_step:
            return Grid(scale=0.2, bits=8, zero=(zero,))
        return Grid(scale=0.2, bits=8, zero=(zero, -3, 5), ratio=tuple(torch.rand(3, generator=generator).tolist()))

    return QuantPlan(
        layers={"conv": layer(3, 5, 3, 3), "linear": layer(4, 6)},
        products={"attention": ProductQuant(query=grid(), key=grid(), value=grid(), probability=grid(-128))},
        float_layers={"head": "last layer"},
        blocks=(
            BlockResult(name="b", layers=("conv", "linear"), loss_before=0.3, loss_after=0.1, rounding="adaround"),
            BlockResult(name="c", layers=("c",), loss_before=None, loss_after=None, rounding="nearest"),
        ),
        scores=torch.rand(7, generator=generator, dtype=torch.float64),
        config=QuantConfig(weight=WeightConfig(bits=bits), keep_float=("x",)),
        provenance={"model": {"name": "tiny"}},
        num_train=100,
        timesteps=torch.tensor([0, 30, 60]) if per_step else None,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved plan."""
    save_plan(plan_of(), tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def same(old: object, new: object) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return torch.equal(old, new) and old.dtype == new.dtype
    if dataclasses.is_dataclass(old):
        return type(old) is type(new) and all(same(value, getattr(new, name)) for name, value in vars(old).items())
    return old == new


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_plan_read_back_is_the_plan_that_was_saved(bits: int, per_step: bool, tmp_path: Path) -> None:
    plan = plan_of(bits, per_step=per_step)
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert list(again.layers) == list(plan.layers)
    for name, layer in plan.layers.items():
        assert same(layer, again.layers[name])
    assert same(plan.products["attention"], again.products["attention"])
    for field in ("float_layers", "blocks", "scores", "config", "provenance", "num_train", "timesteps"):
        assert same(getattr(plan, field), getattr(again, field))


def test_the_same_plan_gives_the_same_bytes_and_nothing_else(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_plan(plan_of(), tmp_path / folder / "plan.safetensors")
    save_plan(load_plan(tmp_path / "a" / "plan.safetensors"), tmp_path / "c" / "plan.safetensors")
    for name in ("plan.safetensors", "plan.json"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["plan.json", "plan.safetensors"]


def test_whoever_may_read_the_json_may_read_the_plan(path: Path) -> None:
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode


def test_four_bit_codes_take_half_a_byte(path: Path) -> None:
    stored = load_file(path)
    assert stored["conv.codes"].numel() == 68  # of 135
    assert stored["linear.codes"].numel() == 12


@given(st.lists(st.integers(-8, 7), max_size=40))
def test_nibbles_come_back_and_the_low_one_is_first(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.int8)
    packed = pack_nibbles(tensor)
    assert packed.dtype == torch.uint8
    assert len(packed) == (len(codes) + 1) // 2
    assert torch.equal(unpack_nibbles(packed, (len(codes),)), tensor)
    for i, code in enumerate(codes):
        assert (int(packed[i // 2]) >> 4 * (i % 2)) & 0xF == code % 16


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 100))
def test_nibbles_keep_any_shape(shape: list[int], seed: int) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), tuple(shape)), codes)


@pytest.mark.parametrize("name", ["plan.safetensors", "plan.json"])
def test_a_missing_file_is_an_error(name: str, path: Path) -> None:
    (path.parent / name).unlink()
    with pytest.raises(CalibError, match=rf"No {name} in .*: run `gaq-export calibrate` first"):
        load_plan(path)


@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_a_truncated_plan_is_an_error(left: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CalibError, match=r"is not a whole safetensors file .*: delete it and run again"):
        load_plan(path)


def test_an_altered_tensor_is_an_error(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CalibError, match=r"plan.safetensors was altered since it was written \(sha256 differs\)"):
        load_plan(path)


def test_altered_json_is_an_error(path: Path) -> None:
    readable = path.with_suffix(".json")
    readable.write_text(readable.read_text().replace("last layer", "lost layer"))
    with pytest.raises(CalibError, match=r"plan.safetensors and plan.json do not belong together"):
        load_plan(path)


@pytest.mark.parametrize("name", ["plan.safetensors", "plan.json"])
def test_halves_of_two_plans_are_an_error(name: str, path: Path, tmp_path: Path) -> None:
    save_plan(plan_of(seed=1), tmp_path / "other" / "plan.safetensors")
    (path.parent / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CalibError, match="do not belong together: run calibrate again"):
        load_plan(path)


def test_a_plan_of_another_format_is_an_error(path: Path) -> None:
    readable = path.with_suffix(".json")
    data = json.loads(readable.read_text()) | {"format": 99}
    readable.write_text(json.dumps(data))
    sha = hashlib.sha256(readable.read_bytes()).hexdigest()
    save_file(load_file(path), path, {"json_sha256": sha})
    with pytest.raises(CalibError, match=r"plan.safetensors has format 99, this version reads 8: run calibrate again"):
        load_plan(path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CalibError, match=r"Cannot write .*plan.json: .*Choose a folder you may write to"):
        save_plan(plan_of(), tmp_path / "file" / "plan.safetensors")


def test_a_plan_that_could_not_be_saved_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CalibError, match="No space left on device"):
            save_plan(plan_of(seed=1), path)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
