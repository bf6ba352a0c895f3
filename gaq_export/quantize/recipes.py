"""Published methods as a few lines of configuration each: what they change of a preset's settings.

All of them combine the same parts: which layers stay float, how ranges are measured, how rounding is learned, how
samples are chosen and weighted, and what the sampler corrects. The preset decides how long all of it takes, so a recipe
changes numbers of iterations only in proportion to the preset's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from calib.choices import (
    ActivationLearning,
    Convention,
    CorrectionRule,
    OmegaRule,
    RangeRule,
    RoundingStart,
    SelectionRule,
    StepScales,
    Trajectory,
)
from calib.config import QuantConfig
from gaq_export.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        description: One line for a list of recipes.
        apply: Turns a preset's settings into the method's.
    """

    description: str
    apply: Callable[[QuantConfig], QuantConfig]


def _rtn(config: QuantConfig) -> QuantConfig:
    # One candidate is the widest scale, and no iterations leave every weight at the nearest code.
    return replace(
        config,
        weight=replace(config.weight, candidates=1),
        activation=replace(config.activation, rule=RangeRule.MINMAX, symmetric=True),
        reconstruction=replace(config.reconstruction, iterations=0, start=RoundingStart.FLOAT),
        omega=replace(config.omega, rule=OmegaRule.UNIFORM),
    )


def _adaround(config: QuantConfig) -> QuantConfig:
    # Only the sample weights differ from the presets'.
    return replace(config, omega=replace(config.omega, rule=OmegaRule.UNIFORM))


def _tfmq(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), convention=Convention.TFMQ, activation=replace(config.activation, per_step=True))


def _gac(config: QuantConfig) -> QuantConfig:
    return replace(_tfmq(config), omega=replace(config.omega, rule=OmegaRule.GAC))


def _ptqd(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), correction=replace(config.correction, rule=CorrectionRule.PTQD))


def _tac(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), correction=replace(config.correction, rule=CorrectionRule.TAC))


def _qdrop(config: QuantConfig) -> QuantConfig:
    return replace(
        _adaround(config), reconstruction=replace(config.reconstruction, activations=ActivationLearning.QDROP)
    )


def _pqd(config: QuantConfig) -> QuantConfig:
    return replace(_qdrop(config), selection=replace(config.selection, rule=SelectionRule.GAUSSIAN))


def _ptq4dm(config: QuantConfig) -> QuantConfig:
    # PQD without moved grids.
    return replace(_pqd(config), activation=replace(config.activation, symmetric=True))


def _q_diffusion(config: QuantConfig) -> QuantConfig:
    reconstruction = replace(config.reconstruction, activations=ActivationLearning.LSQ)
    return replace(_adaround(config), reconstruction=reconstruction, surgery=replace(config.surgery, split=True))


def _eda_dm(config: QuantConfig) -> QuantConfig:
    reconstruction = replace(config.reconstruction, activations=ActivationLearning.QDROP, fine=0.8, regulariser=0.0)
    selection = replace(config.selection, rule=SelectionRule.DENSITY)
    return replace(_adaround(config), reconstruction=reconstruction, selection=selection)


def _tcaq(config: QuantConfig) -> QuantConfig:
    # Two rounds of half as many iterations take as long as one round of any other recipe.
    halved = replace(config.reconstruction, iterations=max(1, config.reconstruction.iterations // 2))
    return replace(
        _adaround(config),
        rounds=2,
        reconstruction=halved,
        activation=replace(config.activation, per_step=True, logarithmic=True),
        surgery=replace(config.surgery, scale_channels=8.0),
    )


def _tdq(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), activation=replace(config.activation, per_step=True, sizes=StepScales.NETWORK))


def _adp(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), activation=replace(config.activation, per_step=True, sizes=StepScales.GROUPS))


def _pcr(config: QuantConfig) -> QuantConfig:
    # Of several activation widths, the last fifth of the steps takes the widest (the paper's activation relaxing).
    activation = replace(config.activation, per_step=True, trajectory=Trajectory.QUANTIZED, wide_window=(0.8, 1.0))
    return replace(_adaround(config), activation=activation)


RECIPES: dict[str, Recipe] = {
    "rtn": Recipe("every weight rounded to nearest on the widest grid, activations on the widest range", _rtn),
    "adaround": Recipe("rounding learned block by block (BRECQ, arXiv 2102.05426)", _adaround),
    "qdrop": Recipe("rounding and activation grids learned together, half of it dropped (arXiv 2203.05740)", _qdrop),
    "ptq4dm": Recipe("qdrop, symmetric, on steps drawn from a normal distribution (arXiv 2211.15736)", _ptq4dm),
    "pqd": Recipe("qdrop on steps drawn from a normal distribution (arXiv 2501.00124)", _pqd),
    "q-diffusion": Recipe("shortcuts in two, activation grids learned after rounding (arXiv 2302.04304)", _q_diffusion),
    "ptqd": Recipe("adaround, and the noise's correlated error, bias and variance corrected (arXiv 2305.10657)", _ptqd),
    "eda-dm": Recipe("qdrop with fine-grained loss, on dense and various steps (EDA-DM, arXiv 2401.04585)", _eda_dm),
    "tcaq": Recipe("channels of like range, two rounds, a grid for each step (TCAQ-DM, arXiv 2412.16700)", _tcaq),
    "tdq": Recipe("a grid for each step, its size given by a small network of t (TDQ, arXiv 2306.02316)", _tdq),
    "adp": Recipe("grids for groups of steps, the assignment learned (after ADP-DM, arXiv 2305.18723)", _adp),
    "pcr": Recipe("a grid for each step, on what the quantized network draws (PCR, arXiv 2311.06322)", _pcr),
    "tac": Recipe("adaround, and each step's noise and drift corrected (TAC-Diffusion, arXiv 2407.03917)", _tac),
    "tfmq": Recipe("the temporal block on its own, a grid for each step (TFMQ-DM, arXiv 2311.16503)", _tfmq),
    "gac": Recipe("tfmq with samples weighted by gradient alignment (GAC, arXiv 2602.01289)", _gac),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`; raise GaqError naming the nearest."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
