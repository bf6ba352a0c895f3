"""What a calibration's settings choose from, one enumeration for each setting that is a word; and what it decided.

Members are strings, so that settings in JSON stay what a person would write, and plans keep their bytes. Nothing here
imports torch: the command line lists the choices in its help texts.
"""

from enum import StrEnum
from typing import TypeVar

from calib.errors import unknown

_Choice = TypeVar("_Choice", bound=StrEnum)


class Convention(StrEnum):
    """Which layers stay float (`calib.float_layers`)."""

    DEPLOY = "deploy"  # whatever an engine runs best
    TFMQ = "tfmq"  # as in the papers' tables


class OmegaRule(StrEnum):
    """How calibration samples are weighted (`calib.omega`), from not at all to the paper's rule."""

    UNIFORM = "uniform"
    RANDOM = "random"
    MSE = "mse"
    GAC = "gac"
    GAC_EXACT = "gac-exact"
    FISH = "fish"


class SoftmaxOver(StrEnum):
    """Which scores compete for weight: those of a mini-batch, or all (`calib.omega.weighting`)."""

    BATCH = "batch"
    SET = "set"


class Cache(StrEnum):
    """Where recordings of a block's inputs and outputs are kept (`calib.sample_store`)."""

    AUTO = "auto"  # where there is room, in the order of the others
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class RangeRule(StrEnum):
    """What the ranges of several batches make together (`calib.ranges`)."""

    EMA = "ema"  # their exponential moving average
    MINMAX = "minmax"  # the widest


class StepScales(StrEnum):
    """Where the activation scale of each sampling step comes from."""

    RANGES = "ranges"  # observed (`calib.ranges`)
    NETWORK = "network"  # learned, as a small network of the timestep (`calib.step_scales`)
    GROUPS = "groups"  # learned, a few for all steps (`calib.step_scales`)


class Trajectory(StrEnum):
    """Whose noisy images activation ranges are observed on."""

    FLOAT = "float"
    QUANTIZED = "quantized"  # step by step (`calib.quantized_trajectory`)


class RoundingStart(StrEnum):
    """The rounding that learning starts from."""

    FLOAT = "float"  # the float weight, as AdaRound does
    GPTQ = "gptq"


class ActivationLearning(StrEnum):
    """What happens to activations while the rounding of a block's weights is learned (`calib.learned_grids`)."""

    FLOAT = "float"  # they stay float, and their ranges are observed in the end
    QDROP = "qdrop"  # they are rounded, and their grids learned with the weights' rounding
    LSQ = "lsq"  # their grids are learned afterwards


class SelectionRule(StrEnum):
    """Which samples calibrate weights (`calib.selection`)."""

    UNIFORM = "uniform"
    GAUSSIAN = "gaussian"
    DENSITY = "density"


class BudgetUnit(StrEnum):
    """What a budget of mixed precision counts (`calib.mixed_precision`)."""

    BITS = "bits"  # of a weight, on average
    MEGABYTES = "MB"  # of all weights, 10^6 bytes each
    GIGA_BIT_OPERATIONS = "Gbit-ops"  # for one image and step
    MILLISECONDS = "ms"  # for one step


class Rounding(StrEnum):
    """What decided a block's rounding in the end (`calib.reconstruct.harden`)."""

    ADAROUND = "adaround"
    NEAREST = "nearest"


class CorrectionRule(StrEnum):
    """What the sampler corrects of the predicted noise (`calib.correction`)."""

    NONE = "none"
    PTQD = "ptqd"
    TAC = "tac"


def choose(kind: type[_Choice], value: str, what: str) -> _Choice:
    """Return the member of `kind` with this value.

    Args:
        kind: the enumeration.
        value: what the user wrote.
        what: the setting, for the message.

    Raises:
        CalibError: no member has it; the message lists them all.
    """
    names = [member.value for member in kind]
    if value not in names:
        raise unknown(what, value, sorted(names))
    return kind(value)
