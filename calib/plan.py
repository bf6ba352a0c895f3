"""The quantization plan: integer weights and scales, exactly what an engine will hold, and how they came about.

On disk a plan is `plan.safetensors` (tensors; codes of 4 bits and fewer packed two a byte, low nibble first) beside
`plan.json` (everything a person might read). Each names the other's sha256, so a mixed or altered pair is refused.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from calib import config as configs
from calib.affine import FLOAT8_LARGEST, integer_range
from calib.attention import OPERANDS
from calib.config import QuantConfig
from calib.correction import Correction
from calib.errors import CalibError
from calib.files import read_safetensors, tensors_digest, write_atomically, write_safetensors
from calib.reconstruct import BlockResult
from calib.records import Count, Positive, Sha256, parse_record
from calib.surgery import Surgery

FORMAT = 8
_ADVICE = "Run calibrate again"
Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that an activation is rounded to: (code - zero) * scale * ratio, the codes symmetric about 0.

    Or, if `log2`, scale * 2^-code, the codes from 0 to 2^bits - 1; such a grid has neither zero nor ratio.

    Attributes:
        scale: float32 value, step of the grid; with `ratio`, at the sampling step with the widest range.
        bits: width, 2 to 8.
        zero: the code that stands for 0, of each sampling step if there is a `ratio`, or else one for all.
        ratio: S float32 values in (0, 1], scale of each sampling step over `scale`; None if all share it.
    """

    scale: Positive
    bits: Bits
    zero: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    ratio: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    log2: bool = False

    def __post_init__(self) -> None:
        low, high = integer_range(self.bits)
        if any(not low <= zero <= high for zero in self.zero):
            raise ValueError(f"a grid of {self.bits} bits with its zero between {low} and {high}")
        if len(self.zero) not in (1, len(self.ratio or (1,))):
            raise ValueError("a grid with one zero, or one for each ratio")

    def float8(self) -> "Grid":
        """Return the grid on which E4M3 numbers reach as far as the integers of this one, 0 in the middle."""
        low, high = integer_range(self.bits)
        reach = max(max(abs(low - zero), abs(high - zero)) for zero in self.zero)
        scale = torch.tensor(self.scale * reach / FLOAT8_LARGEST, dtype=torch.float32)
        return Grid(scale=float(scale), bits=8, ratio=self.ratio)


@dataclass(frozen=True, kw_only=True)
class LayerQuant:
    """One quantized layer.

    Attributes:
        codes: int8, the shape of the float weight; value = codes * weight_scale along axis 0.
        weight_scale: (C,) float32.
        weight_bits: width of the weight grid, 2 to 8.
        input: the grid of the layer's input.
        narrower: the same input's grids of fewer bits, for the steps that take those (`QuantPlan.step_bits`).
        output_scale: float32 value, 8-bit scale of the layer's output; only the `ort-cpu` profile uses it.
    """

    codes: Tensor
    weight_scale: Tensor
    weight_bits: int
    input: Grid
    output_scale: float
    narrower: tuple[Grid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProductQuant:
    """The operands of the two products inside one module's attention, softmax(q k^T) v; see `calib.attention`."""

    query: Grid
    key: Grid
    value: Grid
    probability: Grid


@dataclass(frozen=True, kw_only=True)
class StepBits:
    """How many bits the activations of each sampling step have, and why (`calib.step_bits`).

    Attributes:
        bits: (S,) by rising timestep.
        required_db: (S,) signal over noise that a quantized network has to exceed there; () if that did not decide.
        measured_db: (S,) what it has, by width; {} if that did not decide.
    """

    bits: Annotated[tuple[Bits, ...], Field(min_length=1)]
    required_db: tuple[float, ...] = ()
    measured_db: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Everything an exporter needs, by module name.

    Attributes:
        layers: the quantized layers, of the network as `surgery` rewrites it.
        products: the modules whose products inside attention are quantized.
        float_layers: why each of the others stays float.
        blocks: how well the rounding of each block fits.
        scores: (N,) float64, the sample scores after the last block; see `calib.omega`.
        config: the settings that the plan was calibrated with.
        provenance: what the caller says about model and sampler, a JSON object that nothing here reads.
        num_train: number of training timesteps.
        timesteps: (S,) int64, rising: the timesteps of the sampling steps, where grids have a `ratio` or activations
            `step_bits`; any other t takes the nearest one's (`calib.ranges.nearest_step`).
        correction: of the predicted noise, for the steps of the calibrated sampler and no others.
        sensitivity: error of the predicted noise with one layer alone quantized, by layer and weight bits; only of
            mixed precision (`calib.mixed_precision`).
        surgery: how the network is rewritten before it is quantized.
        step_bits: activation bits of each sampling step, where steps differ.
    """

    layers: Mapping[str, LayerQuant]
    products: Mapping[str, ProductQuant]
    float_layers: Mapping[str, str]
    blocks: tuple[BlockResult, ...]
    scores: Tensor
    config: QuantConfig
    provenance: Mapping[str, Any]
    num_train: int
    timesteps: Tensor | None = None
    correction: Correction | None = None
    sensitivity: Mapping[str, Mapping[int, float]] | None = None
    surgery: Surgery = field(default_factory=Surgery)
    step_bits: StepBits | None = None


@dataclass(frozen=True, kw_only=True)
class _LayerRecord:
    """What `plan.json` says of a layer; packed codes do not have its shape."""

    shape: Annotated[tuple[Count, ...], Field(min_length=1)]
    weight_bits: Bits
    input: Grid
    narrower: tuple[Grid, ...]
    output_scale: Positive

    @property
    def grids(self) -> tuple[Grid, ...]:
        return (self.input, *self.narrower)


@dataclass(frozen=True, kw_only=True)
class _PlanRecord:
    """What `plan.json` holds; the fields are those of `QuantPlan`, where they have the same name."""

    format: int
    about: dict[str, Any]
    config: QuantConfig
    num_train: Count
    layers: dict[str, _LayerRecord]
    products: dict[str, ProductQuant]
    float_layers: dict[str, str]
    blocks: tuple[BlockResult, ...]
    correction: Correction | None
    sensitivity: dict[str, dict[int, float]] | None
    splits: dict[str, Count]
    step_bits: StepBits | None
    tensors_sha256: Sha256


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] two a byte, low nibble first; returns (ceil(n / 2),) uint8.

    >>> pack_nibbles(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist()
    [241, 7]
    """
    flat = codes.flatten().to(torch.uint8) & 0xF
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack_nibbles(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_nibbles`: return the int8 codes, in `shape`, of packed bytes (ceil(n / 2),) uint8."""
    flat = torch.stack([packed & 0xF, packed >> 4], 1).flatten()[: math.prod(shape)].to(torch.int8)
    return torch.where(flat > 7, flat - 16, flat).reshape(shape)


def save_plan(plan: QuantPlan, path: Path) -> None:
    """Write `path` (.safetensors) and the .json beside it; the same plan gives the same bytes.

    Raises:
        CalibError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {"omega_scores": plan.scores}
    if plan.timesteps is not None:
        tensors["timesteps"] = plan.timesteps
    tensors |= {f"{name}.factors": factors for name, factors in plan.surgery.factors.items()}
    for name, q in plan.layers.items():
        tensors[f"{name}.codes"] = pack_nibbles(q.codes) if q.weight_bits <= 4 else q.codes.contiguous()
        tensors[f"{name}.weight_scale"] = q.weight_scale.contiguous()
    products = {
        name: {what: dataclasses.asdict(getattr(p, what)) for what in OPERANDS} for name, p in plan.products.items()
    }
    readable = {
        "format": FORMAT,
        "about": dict(plan.provenance),
        "config": configs.to_json(plan.config),
        "num_train": plan.num_train,
        "layers": {name: _layer_json(q) for name, q in plan.layers.items()},
        "products": products,
        "float_layers": dict(plan.float_layers),
        "blocks": [dataclasses.asdict(b) for b in plan.blocks],
        "correction": plan.correction and plan.correction.to_json(),
        "sensitivity": plan.sensitivity,
        "splits": dict(plan.surgery.splits),
        "step_bits": plan.step_bits and dataclasses.asdict(plan.step_bits),
        "tensors_sha256": tensors_digest(tensors),
    }
    text = json.dumps(readable, indent=1).encode()
    write_atomically(path.with_suffix(".json"), text)
    write_safetensors(path, tensors, {"json_sha256": hashlib.sha256(text).hexdigest()})


def _layer_json(layer: LayerQuant) -> dict[str, Any]:
    return {
        "shape": list(layer.codes.shape),  # packed codes do not have it
        "weight_bits": layer.weight_bits,
        "input": dataclasses.asdict(layer.input),
        "narrower": [dataclasses.asdict(grid) for grid in layer.narrower],
        "output_scale": layer.output_scale,
    }


def load_plan(path: Path) -> QuantPlan:
    """Read a plan back.

    Raises:
        CalibError: a file is missing, cut short, altered, of another format, or not the other's partner.
    """
    readable_path = path.with_suffix(".json")
    for file in (path, readable_path):
        if not file.is_file():
            raise CalibError(f"No {file.name} in {file.parent}: run `gaq-export calibrate` first.")
    text = readable_path.read_bytes()
    header, tensors = read_safetensors(path)
    if header.get("json_sha256") != hashlib.sha256(text).hexdigest():
        raise CalibError(f"{path.name} and {readable_path.name} do not belong together: run calibrate again.")
    # The format first: a record of another version must not be half understood.
    if (version := parse_record(dict[str, Any], text, readable_path, _ADVICE).get("format")) != FORMAT:
        raise CalibError(f"{path.name} has format {version!r}, this version reads {FORMAT}: run calibrate again.")
    data = parse_record(_PlanRecord, text, readable_path, _ADVICE)
    if data.tensors_sha256 != tensors_digest(tensors):
        raise CalibError(f"{path.name} was altered since it was written (sha256 differs): run calibrate again.")
    _check_tensors(path, data, tensors)
    factors = {name.removesuffix(".factors"): v for name, v in tensors.items() if name.endswith(".factors")}
    return QuantPlan(
        layers={name: _layer(name, record, tensors) for name, record in data.layers.items()},
        products=data.products,
        float_layers=data.float_layers,
        blocks=data.blocks,
        scores=tensors["omega_scores"],
        config=data.config,
        provenance=data.about,
        num_train=data.num_train,
        timesteps=tensors.get("timesteps"),
        correction=data.correction,
        sensitivity=data.sensitivity,
        surgery=Surgery(splits=data.splits, factors=factors),
        step_bits=data.step_bits,
    )


def _layer(name: str, record: _LayerRecord, tensors: Mapping[str, Tensor]) -> LayerQuant:
    codes = tensors[f"{name}.codes"]
    return LayerQuant(
        codes=unpack_nibbles(codes, record.shape) if record.weight_bits <= 4 else codes,
        weight_scale=tensors[f"{name}.weight_scale"],
        weight_bits=record.weight_bits,
        input=record.input,
        narrower=record.narrower,
        output_scale=record.output_scale,
    )


def _check_tensors(path: Path, data: _PlanRecord, tensors: Mapping[str, Tensor]) -> None:
    """Raise CalibError if the tensors are not those that `plan.json` speaks of."""

    def check(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CalibError(f"{path}: {name} is not {expected}. {_ADVICE}.")

    expected = {f"{name}.{part}" for name in data.layers for part in ("codes", "weight_scale")} | {"omega_scores"}
    check("a tensor", expected <= tensors.keys(), f"there: {sorted(expected - tensors.keys())[:1]}")
    scores = tensors["omega_scores"]
    check("omega_scores", scores.dim() == 1 and scores.dtype == torch.float64, "a float64 vector")
    for name, layer in data.layers.items():
        codes, scale, bits = tensors[f"{name}.codes"], tensors[f"{name}.weight_scale"], layer.weight_bits
        count = math.prod(layer.shape)
        kind, shape = (torch.uint8, (-(-count // 2),)) if bits <= 4 else (torch.int8, layer.shape)
        check(f"{name}.codes", codes.dtype == kind and codes.shape == shape, f"{kind} of shape {shape}")
        low, high = integer_range(bits)
        values = unpack_nibbles(codes, layer.shape) if bits <= 4 else codes
        check(f"{name}.codes", bool(((values >= low) & (values <= high)).all()), f"in the range of {bits} bits")
        check(
            f"{name}.weight_scale", scale.shape == layer.shape[:1] and _positive(scale), "one positive scale a channel"
        )
    for name in tensors.keys() - expected - {"timesteps"}:
        known = name.endswith(".factors") and tensors[name].dim() == 1 and _positive(tensors[name])
        check(name, known, "a tensor of a plan")
    _check_steps(path, data, tensors.get("timesteps"))


def _positive(values: Tensor) -> bool:
    return values.dtype == torch.float32 and bool(((values > 0) & values.isfinite()).all())


def _check_steps(path: Path, data: _PlanRecord, timesteps: Tensor | None) -> None:
    """Raise CalibError if what differs by sampling step is not given for each of the timesteps (S,)."""
    steps = 0 if timesteps is None else len(timesteps)
    if timesteps is not None:
        rising = timesteps.dim() == 1 and timesteps.dtype == torch.int64 and bool((timesteps.diff() > 0).all())
        if not rising or steps == 0 or timesteps[0] < 0 or timesteps[-1] >= data.num_train:
            raise CalibError(f"{path}: timesteps are not rising, from 0 to less than {data.num_train}. {_ADVICE}.")
    by_layer = [(name, layer.grids) for name, layer in data.layers.items()]
    by_product = [(name, tuple(getattr(p, what) for what in OPERANDS)) for name, p in data.products.items()]
    for name, grids in (*by_layer, *by_product):
        if any(grid.ratio is not None and len(grid.ratio) != steps for grid in grids):
            raise CalibError(f"{path}: {name} has a grid for another number of steps than {steps}. {_ADVICE}.")
    if data.step_bits is not None and len(data.step_bits.bits) != steps:
        raise CalibError(f"{path}: step_bits has {len(data.step_bits.bits)} steps, expected {steps}. {_ADVICE}.")
