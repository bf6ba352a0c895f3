"""What the user said about calibration, frozen. Settings are checked here, and nothing is computed from them.

Defaults are the published schedule of TFMQ-DM, on which GAC (arXiv 2602.01289) builds: 20 000 iterations for each
block, batches of 32, rounding regulariser 0.01, beta from 20 to 2 after a warm-up of 0.2, moving averages of momentum
0.95.

The settings are part of a plan's JSON and of the key that finished blocks are found by: a renamed field, or fields in
another order, make another plan.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from calib.choices import (
    ActivationLearning,
    BudgetUnit,
    Convention,
    CorrectionRule,
    OmegaRule,
    RangeRule,
    RoundingStart,
    SelectionRule,
    SoftmaxOver,
    StepScales,
    Trajectory,
    choose,
)
from calib.errors import CalibError

BITS = range(2, 9)
LARGEST_SEED = 2**63 - 1  # files hold seeds as int64
FLOAT_BITS = 32  # of a layer that stays float
_T = TypeVar("_T")


def _choose(config: object, name: str, kind: type[StrEnum], what: str) -> None:
    """Turn a setting that may still be a plain string, from JSON or a caller, into the member that it names."""
    object.__setattr__(config, name, choose(kind, getattr(config, name), what))


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """Symmetric weight grids, one for each output channel."""

    bits: int = 4
    norm: float = 2.4  # exponent of the error that the scale search minimises
    candidates: int = 80  # shrink factors 1.00, 0.99, ... that it tries


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Activation grids, one for each tensor."""

    bits: int = 8
    rule: RangeRule = RangeRule.EMA
    momentum: float = 0.95  # of EMA
    per_step: bool = False  # a grid for each sampling step (TFMQ-DM's finite set calibration)
    symmetric: bool = False  # or else a grid lies where the values do, if that makes it much finer
    batch: int = 16
    sizes: StepScales = StepScales.RANGES  # of the grids of `per_step`
    trajectory: Trajectory = Trajectory.FLOAT
    logarithmic: bool = False  # powers of two for attention probabilities that follow a power law
    narrower: tuple[int, ...] = ()  # fewer bits that a sampling step may take instead (`calib.step_bits`)
    wide_window: tuple[float, float] | None = None  # which steps keep `bits`, as shares counted from the noisiest
    batches: int | None = None  # None: every collected sample once; split evenly over the steps if `per_step`

    def __post_init__(self) -> None:
        _choose(self, "rule", RangeRule, "activation rule")
        _choose(self, "sizes", StepScales, "source of step scales")
        _choose(self, "trajectory", Trajectory, "trajectory")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How the rounding of each block is learned (AdaRound, BRECQ)."""

    iterations: int = 20_000  # 0: no learning, weights are rounded to nearest or by GPTQ
    batch: int = 32
    learning_rate: float = 1e-3
    start: RoundingStart = RoundingStart.FLOAT
    regulariser: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2  # share of the iterations without regulariser
    activations: ActivationLearning = ActivationLearning.FLOAT
    drop: float = 0.5  # of QDROP: share of a block's input taken from the float network, and of activations left float
    activation_iterations: int = 5_000  # of LSQ
    activation_learning_rate: float = 4e-4  # of the activation scales, falling to 0 along a cosine
    fine: float = 0.0  # weight of the losses of the layers inside a block beside its own, gamma of EDA-DM

    def __post_init__(self) -> None:
        _choose(self, "start", RoundingStart, "rounding start")
        _choose(self, "activations", ActivationLearning, "activations in reconstruction")
        if self.iterations < 0:
            raise CalibError(f"Found {self.iterations} iterations for a block; give 0 (no learning) or more.")

    @property
    def wants_reference(self) -> bool:
        """Whether the inputs of a block in the float network are needed too."""
        return self.activations is not ActivationLearning.FLOAT or self.fine > 0

    @property
    def passes(self) -> int:
        """How many iterations a block has in all."""
        lsq = self.activations is ActivationLearning.LSQ
        return self.iterations + (self.activation_iterations if lsq else 0)


@dataclass(frozen=True, kw_only=True)
class OmegaConfig:
    """How calibration samples are weighted (`calib.omega`)."""

    rule: OmegaRule = OmegaRule.GAC
    groups: int = 5  # contiguous groups of sampling steps, the tasks of the paper
    temperature: float = 1.0
    softmax: SoftmaxOver = SoftmaxOver.BATCH
    validation: float = 0.05  # share of each step's samples that is set aside
    meta_steps: int = 500
    meta_learning_rate: float = 1e-2
    inner_step: float = 1e-2  # RMS change of the rounding logits by one sample's gradient, in the inner update
    batch: int = 32  # training samples whose scores one block updates
    validation_batch: int = 8  # samples of each group, drawn anew for each meta-step; memory grows with it

    def __post_init__(self) -> None:
        _choose(self, "rule", OmegaRule, "omega rule")
        _choose(self, "softmax", SoftmaxOver, "omega softmax")


@dataclass(frozen=True, kw_only=True)
class SurgeryConfig:
    """How the float network is rewritten before it is quantized (`calib.surgery`)."""

    split: bool = False  # a convolution of a concatenation becomes two
    scale_channels: float = 0.0  # largest factor that evens out the ranges of input channels; 0: off
    images: int = 8  # samples of each step whose ranges count


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """Weight bits chosen layer by layer within a budget (`calib.mixed_precision`); budget 0: the same for all."""

    budget: float = 0.0
    unit: BudgetUnit = BudgetUnit.BITS
    choices: tuple[int, ...] = (4, 8, FLOAT_BITS)
    images: int = 4  # samples of each step that is measured
    steps: int = 8  # sampling steps that are measured

    def __post_init__(self) -> None:
        _choose(self, "unit", BudgetUnit, "unit of a budget")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which samples calibrate weights (`calib.selection`)."""

    rule: SelectionRule = SelectionRule.UNIFORM
    mean: float = 0.4  # of GAUSSIAN, as a share of the steps
    deviation: float = 0.4  # of GAUSSIAN, as a share of the steps
    images: int = 8  # of DENSITY: samples of each step whose features are compared
    radius: float = 0.5  # of DENSITY: features nearer than this times the mean error count as near
    variety: float = 1.2  # of DENSITY: weight of variety beside density, the paper's lambda

    def __post_init__(self) -> None:
        _choose(self, "rule", SelectionRule, "selection rule")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """What the sampler corrects of the predicted noise (`calib.correction`)."""

    rule: CorrectionRule = CorrectionRule.NONE
    images: int = 16  # of TAC: trajectories of the quantized network; PTQD uses the calibration's
    relative: float = 0.5  # of TAC: weight of the relative error, lambda 1
    ridge: float = 0.1  # of TAC: pull towards no correction, lambda 2
    floor: float = 1.0  # of TAC: values below this times their mean magnitude do not count

    def __post_init__(self) -> None:
        _choose(self, "rule", CorrectionRule, "correction")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """All settings of one calibration.

    Raises:
        CalibError: a width out of range, an unknown choice, or settings that contradict each other.
    """

    weight: WeightConfig = field(default_factory=WeightConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    omega: OmegaConfig = field(default_factory=OmegaConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    mixed: MixedConfig = field(default_factory=MixedConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    convention: Convention = Convention.DEPLOY
    keep_float: tuple[str, ...] = ()  # shell patterns of the names of further layers that stay float
    rounds: int = 1  # calibrations; each but the first is on what the network quantized by the one before draws
    weight_steps: int = 20  # as many samples calibrate weights as this many sampling steps have
    micro_batch: int = 16  # samples in a forward pass while blocks are recorded; decides the last bits of a plan
    seed: int = 0

    def __post_init__(self) -> None:
        _choose(self, "convention", Convention, "convention")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise CalibError(f"Found the seed {self.seed}; give a whole number from 0 to {LARGEST_SEED}.")
        _check_bits(self)
        _check_combinations(self)


def _check_bits(config: QuantConfig) -> None:
    """Raise CalibError if a width is out of range."""
    activation = config.activation
    for what, bits in (("weight", config.weight.bits), ("activation", activation.bits)):
        if bits not in BITS:
            raise CalibError(f"{what} bits = {bits}: choose a whole number from {BITS[0]} to {BITS[-1]}.")
    if any(bits not in BITS or bits >= activation.bits for bits in activation.narrower):
        raise CalibError(
            f"Found {list(activation.narrower)} as activation bits beside {activation.bits}; choose {BITS[0]} to fewer."
        )
    if wrong := [bits for bits in config.mixed.choices if bits not in (*BITS, FLOAT_BITS)]:
        raise CalibError(
            f"Found {wrong[0]} among the bits to choose from; choose {BITS[0]} to {BITS[-1]}, or {FLOAT_BITS}."
        )


def _check_combinations(config: QuantConfig) -> None:
    """Raise CalibError if settings contradict each other."""
    activation, learning = config.activation, config.reconstruction.activations
    special = activation.trajectory is not Trajectory.FLOAT or activation.sizes is not StepScales.RANGES
    if special and not activation.per_step:
        raise CalibError(
            "Grids on the quantized trajectory, and learned step scales, need a grid for each step: set `per_step`."
        )
    if learning is ActivationLearning.FLOAT:
        return
    if activation.narrower:
        raise CalibError(
            f"Activation grids learned with the rounding ('{learning}') have one width; give one, or learn "
            "the rounding with float activations."
        )
    if activation.per_step:
        raise CalibError(
            f"Activation grids learned with the rounding ('{learning}') are the same for all steps; give "
            "up a grid for each step, or learn the rounding with float activations."
        )


def to_json(config: QuantConfig) -> dict[str, Any]:
    """Return the config as nested plain values."""
    return dataclasses.asdict(config)
