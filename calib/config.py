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
    sizes: str = "ranges"  # of `per_step` grids: from the ranges, or learned, by a "network" of t or in "groups"
    trajectory: str = "float"  # whose x_t are observed: the float network's or, step by step, the "quantized" one's
    logarithmic: bool = False  # inside attention: probabilities that follow a power law on powers of two
    narrower: tuple[int, ...] = ()  # widths that a step may take in place of `bits`, by calib.step_bits
    wide_window: tuple[float, float] | None = None  # share of the sampling steps, from the noisiest, that keep `bits`
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
    activations: str = "float"  # meanwhile; or "qdrop", rounded and their steps learned; "lsq", learned afterwards
    drop: float = 0.5  # of "qdrop": share of a block's input from the float network, and of activations left float
    activation_iterations: int = 5_000  # of "lsq"
    activation_learning_rate: float = 4e-4  # of the steps, falling to 0 along a cosine
    fine: float = 0.0  # weight of the losses of the layers inside a block beside its own, gamma of EDA-DM

    @property
    def wants_reference(self) -> bool:
        """Whether what goes into a block in the float network is needed."""
        return self.activations != "float" or self.fine > 0

    @property
    def passes(self) -> int:
        """Iterations a block in all."""
        return self.iterations + (self.activation_iterations if self.activations == "lsq" else 0)


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
class SurgeryConfig:
    """How the float network is rewritten beforehand, by calib.surgery."""

    split: bool = False  # convolutions of a concatenation in two
    scale_channels: float = 0.0  # input channels of convolutions brought to like ranges, by at most this; 0 = off
    images: int = 8  # samples of each step whose ranges count


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """Weight bits chosen layer by layer within a budget (`calib.mixed_precision`); budget 0: the same for all."""

    budget: float = 0.0
    unit: str = "bits"  # of a weight, on average; "MB" of all weights; "Gbit-ops" an image and step; or "ms" a step
    choices: tuple[int, ...] = (4, 8, 32)  # widths to choose from; 32 leaves a layer float
    images: int = 4  # whose samples, at each of
    steps: int = 8  # so many sampling steps, measure what a layer's bits matter


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which samples calibrate weights, by the rules of calib.selection."""

    rule: str = "uniform"
    mean: float = 0.4  # of "gaussian", as a share of the steps
    deviation: float = 0.4  # of "gaussian", likewise
    images: int = 8  # of "density": samples of a step whose features are compared
    radius: float = 0.5  # of "density": features nearer than this times the mean error count as near
    variety: float = 1.2  # of "density": its weight beside the density, lambda


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
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    mixed: MixedConfig = field(default_factory=MixedConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    convention: str = "deploy"  # which layers stay float: see calib.float_layers.CONVENTIONS
    keep_float: tuple[str, ...] = ()  # shell patterns of further layer names
    rounds: int = 1  # calibrations; those after the first on what the network quantized by the one before draws
    weight_steps: int = 20  # as many samples as this many sampling steps have calibrate weights
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
            ("activations in reconstruction", self.reconstruction.activations, RECONSTRUCTION_ACTIVATIONS),
            ("correction", self.correction.rule, CORRECTIONS),
            ("sizes of steps", self.activation.sizes, STEP_SIZES),
            ("trajectory", self.activation.trajectory, TRAJECTORIES),
            ("selection rule", self.selection.rule, SELECTIONS),
            ("unit of a budget", self.mixed.unit, BUDGET_UNITS),
        ):
            if value not in known:
                raise CalibError(f"Unknown {what} {value!r}. Choose one of {sorted(known)}.")
        special = self.activation.trajectory != "float" or self.activation.sizes != "ranges"
        if special and not self.activation.per_step:
            raise CalibError("Grids on the quantized trajectory, or of learned sizes, are of each step: ask for those.")
        narrower, learned = self.activation.narrower, self.reconstruction.activations
        if any(bits not in BITS or bits >= self.activation.bits for bits in narrower):
            raise CalibError(
                f"Found {list(narrower)} as activation bits beside {self.activation.bits}; choose {BITS[0]} to fewer."
            )
        if narrower and learned != "float":
            raise CalibError(
                f"Activation grids learned with the rounding ({learned!r}) have one width; give one, or learn the "
                "rounding with float activations."
            )
        if wrong := [bits for bits in self.mixed.choices if bits not in (*BITS, 32)]:
            raise CalibError(f"Found {wrong[0]} among the bits to choose from; choose {BITS[0]} to {BITS[-1]}, or 32.")
        if self.activation.per_step and self.reconstruction.activations != "float":
            raise CalibError(
                f"Activation grids learned with the rounding ({self.reconstruction.activations!r}) are one for all "
                "steps; give up a grid for each step, or learn the rounding with float activations."
            )


OMEGA_RULES = ("uniform", "random", "mse", "gac", "gac-exact", "fish")
OMEGA_SOFTMAX = ("batch", "set")
RANGE_RULES = ("ema", "minmax")
ROUNDING_STARTS = ("float", "gptq")
RECONSTRUCTION_ACTIVATIONS = ("float", "qdrop", "lsq")
CORRECTIONS = ("none", "ptqd", "tac")
STEP_SIZES = ("ranges", "network", "groups")
TRAJECTORIES = ("float", "quantized")
BUDGET_UNITS = ("bits", "MB", "Gbit-ops", "ms")
SELECTIONS = ("uniform", "gaussian", "density")


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
    return _part(QuantConfig, parts)


def _part(kind: type[_T], data: Mapping[str, Any]) -> _T:
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise CalibError(f"Unknown setting {key!r} in {kind.__name__}; it has {known}.{hint}")
    return kind(**data)
