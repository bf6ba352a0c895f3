"""The plan on disk: to the bit what was calibrated, or an error that says what is wrong."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calib.config import QuantConfig, WeightConfig
from calib.errors import CalibError
from calib.files import tensors_digest
from calib.plan import (
    Grid,
    LayerQuant,
    ProductQuant,
    QuantPlan,
    StepBits,
    load_plan,
    pack_nibbles,
    save_plan,
    unpack_nibbles,
)
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


def resign(path: Path, change: Callable[[dict], object], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Edit a plan so that its checksums hold, as whoever wants to be believed would."""
    tensors = load_file(path) if tensors is None else tensors
    readable = path.with_suffix(".json")
    data = json.loads(readable.read_text()) | {"tensors_sha256": tensors_digest(tensors)}
    change(data)
    readable.write_text(json.dumps(data))
    save_file(tensors, path, {"json_sha256": hashlib.sha256(readable.read_bytes()).hexdigest()})


def refused(path: Path, message: str) -> None:
    with pytest.raises(CalibError, match=message) as error:
        load_plan(path)
    assert "\n" not in str(error.value)
    assert str(error.value).lower().endswith("run calibrate again.")


def at(data: object, place: str) -> tuple[object, str | int]:
    """Return the container of a place such as "layers.conv.input.scale", and its key there."""
    *way, last = [int(key) if key.isdecimal() else key for key in place.split(".")]
    for key in way:
        data = data[key]  # type: ignore[index]
    return data, last


PLACES = [
    "about",
    "config",
    "config.weight",
    "config.weight.bits",
    "config.omega.rule",
    "num_train",
    "layers",
    "layers.conv",
    "layers.conv.shape",
    "layers.conv.shape.0",
    "layers.conv.weight_bits",
    "layers.conv.input",
    "layers.conv.input.scale",
    "layers.conv.input.zero",
    "layers.conv.input.zero.0",
    "layers.conv.input.ratio",
    "layers.conv.narrower",
    "layers.conv.output_scale",
    "products",
    "products.attention.key",
    "products.attention.key.bits",
    "float_layers",
    "blocks",
    "blocks.0",
    "blocks.0.layers",
    "blocks.0.loss_after",
    "blocks.0.rounding",
    "correction",
    "sensitivity",
    "splits",
    "step_bits",
    "step_bits.bits",
    "step_bits.bits.0",
    "step_bits.measured_db",
    "tensors_sha256",
]
OPTIONAL = ("layers.conv.input.ratio", "layers.conv.input.zero", "step_bits.measured_db")  # have a default
NULLABLE = ("correction", "sensitivity", "step_bits", "blocks.0.loss_after", "layers.conv.input.ratio")
WRONG = ["x", -1, 10**30, [[[]]], {"a": {"b": None}}, True, math.nan]
FITS = {  # what some places may hold of that
    "about": [{"a": {"b": None}}],
    "blocks.0.loss_after": [10**30],
    "layers.conv.input.scale": [10**30],
    "layers.conv.output_scale": [10**30],
    "layers.conv.input.zero.0": [-1],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_field_of_the_json_that_is_missing_or_wrong_is_one_line(place: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(dataclasses.replace(plan_of(per_step=True), step_bits=StepBits(bits=(8, 8, 8))), path)
    whole, tensors = path.with_suffix(".json").read_text(), load_file(path)

    def spoil(change: Callable[[object, str | int], object]) -> None:
        path.with_suffix(".json").write_text(whole)
        resign(path, lambda data: change(*at(data, place)), tensors)

    def put(value: object) -> Callable[[object, str | int], object]:
        return lambda inside, key: inside.__setitem__(key, value)  # type: ignore[attr-defined]

    wrong = [*WRONG, *([] if place in NULLABLE else [None])]
    for value in [value for value in wrong if not any(value is fit or value == fit for fit in FITS.get(place, []))]:
        spoil(put(value))
        refused(path, "plan")
    if not place[-1].isdecimal() and not place.startswith("config.") and place not in OPTIONAL:
        spoil(lambda inside, key: inside.pop(key))  # type: ignore[attr-defined]
        refused(path, "is missing|is not a tensor")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": ' + "9" * 9999 + "}", "\x00"])
def test_json_of_another_kind_is_one_line(text: str, path: Path) -> None:
    tensors = load_file(path)
    path.with_suffix(".json").write_text(text)
    save_file(tensors, path, {"json_sha256": hashlib.sha256(text.encode()).hexdigest()})
    refused(path, "plan")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv.codes", None, r"a tensor is not there: \['conv.codes'\]"),
        ("conv.codes", torch.zeros(67, dtype=torch.uint8), r"conv.codes is not torch.uint8 of shape \(68,\)"),
        ("conv.codes", torch.zeros(68, dtype=torch.int8), r"conv.codes is not torch.uint8 of shape \(68,\)"),
        ("conv.weight_scale", torch.zeros(3), "conv.weight_scale is not one positive scale a channel"),
        ("conv.weight_scale", torch.full((3,), torch.nan), "conv.weight_scale is not one positive scale a channel"),
        ("conv.weight_scale", torch.ones(4), "conv.weight_scale is not one positive scale a channel"),
        ("conv.weight_scale", torch.ones(3).double(), "conv.weight_scale is not one positive scale a channel"),
        ("omega_scores", torch.zeros(2, 2), "omega_scores is not a float64 vector"),
        ("another", torch.zeros(2), "another is not a tensor of a plan"),
        ("conv.factors", torch.zeros(5), "conv.factors is not a tensor of a plan"),
        ("timesteps", torch.tensor([5, 4]), "timesteps are not rising, from 0 to less than 100"),
        ("timesteps", torch.tensor([5, 100]), "timesteps are not rising, from 0 to less than 100"),
    ],
)
def test_tensors_that_are_not_what_the_json_says_are_one_line(
    name: str, value: torch.Tensor | None, message: str, path: Path
) -> None:
    tensors = load_file(path)
    tensors = {key: kept for key, kept in tensors.items() if key != name} | ({} if value is None else {name: value})
    resign(path, lambda data: None, tensors)
    refused(path, message)


def test_codes_and_steps_out_of_range_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan_of(5), path)
    tensors = load_file(path)
    tensors["conv.codes"][0, 0, 0, 0] = 16
    resign(path, lambda data: None, tensors)
    refused(path, "conv.codes is not in the range of 5 bits")
    save_plan(dataclasses.replace(plan_of(per_step=True), step_bits=StepBits(bits=(8, 8, 8, 8))), path)
    refused(path, "step_bits has 4 steps, expected 3")
    save_plan(dataclasses.replace(plan_of(per_step=True), timesteps=torch.tensor([1, 2])), path)
    refused(path, "conv has a grid for another number of steps than 2")


def test_a_plan_of_another_format_is_an_error(path: Path) -> None:
    resign(path, lambda data: data.update({"format": 99}))
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
