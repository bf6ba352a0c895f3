"""What the user said about calibration, frozen; nothing here computes.

Defaults are the published schedule of TFMQ-DM, on which GAC (arXiv 2602.01289) builds: 20 000 iterations a block,
batch 32, rounding regulariser 0.01, beta 20 -> 2 after a warm-up of 0.2, EMA momentum 0.95.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from calib.errors import CalibError

BITS = range(2, 9)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """Symmetric per-output-channel weight grids."""

    bits: int = 4
    norm: float = 2.4  # exponent of the error that the scale search minimises
    candidates: int = 80  # shrink factors 1.00, 0.99, ... that it tries


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Per-tensor activation grids: `rule` is "ema" (moving average of the range) or "minmax" (the widest)."""

    bits: int = 8
    rule: str = "ema"
    momentum: float = 0.95  # of "ema"
    per_step: bool = False  # a grid for each sampling step (TFMQ-DM's finite set calibration)
    symmetric: bool = False  # or else a grid lies where the values do, if that makes it much finer
    batch: int = 16
    batches: int | None = None  # None = every collected sample once; split evenly over the steps if `per_step`


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """AdaRound block reconstruction."""

    iterations: int = 20_000  # 0 = the start alone: every weight rounded to nearest, or by GPTQ
    batch: int = 32
    learning_rate: float = 1e-3
    start: str = "float"  # rounding to start from: "float" (AdaRound's, the float weight) or "gptq"
    regulariser: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2  # fraction of the iterations without regulariser


@dataclass(frozen=True, kw_only=True)
class OmegaConfig:
    """Sample weights by the rules of calib.omega, from none ("uniform") to the paper's ("gac")."""

    rule: str = "gac"
    groups: int = 5  # contiguous groups of sampling steps, the tasks of the paper
    temperature: float = 1.0
    softmax: str = "batch"  # over the "batch" or the whole "set"
    validation: float = 0.05
    meta_steps: int = 500
    meta_learning_rate: float = 1e-2
    inner_step: float = 1e-2  # change of the rounding logits in the inner update: that of one sample's gradient, RMS
    batch: int = 32  # training samples whose scores a block updates
    validation_batch: int = 8  # samples a group, drawn anew at each meta step; memory goes with it


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """What the sampler corrects of the predicted noise, by the rules of calib.correction."""

    rule: str = "none"
    images: int = 16  # trajectories of the quantized network; "ptqd" uses the calibration's
    relative: float = 0.5  # of "tac": weight of the relative error, lambda 1
    ridge: float = 0.1  # of "tac": pull towards no correction, lambda 2
    floor: float = 1.0  # of "tac": values below this times their mean magnitude do not count


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """All settings of one calibration."""

    weight: WeightConfig = field(default_factory=WeightConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    omega: OmegaConfig = field(default_factory=OmegaConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    convention: str = "deploy"  # which layers stay float: see calib.layers.CONVENTIONS
    keep_float: tuple[str, ...] = ()  # shell patterns of further layer names
    weight_steps: int = 20  # sampling steps, evenly spaced, whose samples calibrate weights
    micro_batch: int = 16  # samples per forward pass when recording; fixed, since it decides the last bits
    seed: int = 0

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight.bits), ("activation", self.activation.bits)):
            if bits not in BITS:
                raise CalibError(f"{what} bits = {bits}: choose a whole number from {BITS[0]} to {BITS[-1]}.")
        for what, value, known in (
            ("omega rule", self.omega.rule, OMEGA_RULES),
            ("omega softmax", self.omega.softmax, OMEGA_SOFTMAX),
            ("activation rule", self.activation.rule, RANGE_RULES),
            ("rounding start", self.reconstruction.start, ROUNDING_STARTS),
            ("correction", self.correction.rule, CORRECTIONS),
        ):
            if value not in known:
                raise CalibError(f"Unknown {what} {value!r}. Choose one of {sorted(known)}.")


OMEGA_RULES = ("uniform", "random", "mse", "gac", "gac-exact", "fish")
OMEGA_SOFTMAX = ("batch", "set")
RANGE_RULES = ("ema", "minmax")
ROUNDING_STARTS = ("float", "gptq")
CORRECTIONS = ("none", "ptqd", "tac")


def to_json(config: QuantConfig) -> dict[str, Any]:
    """Return the config as nested plain values."""
    return dataclasses.asdict(config)


def from_json(data: Mapping[str, Any]) -> QuantConfig:
    """Rebuild a config; raise CalibError on a key that no config has, naming the nearest one."""
    hints = get_type_hints(QuantConfig)
    parts = {
        key: _part(hints[key], value) if isinstance(value, Mapping) and key in hints else value
        for key, value in data.items()
    }
    if isinstance(parts.get("keep_float"), list):
        parts["keep_float"] = tuple(parts["keep_float"])
    return _part(QuantConfig, parts)


def _part(kind: type[_T], data: Mapping[str, Any]) -> _T:
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise CalibError(f"Unknown setting {key!r} in {kind.__name__}; it has {known}.{hint}")
    return kind(**data)
