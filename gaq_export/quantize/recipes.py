"""Published recipes as one line of configuration each: what they change of a schedule's settings.

A recipe is a composition of parts that are there for all of them: which layers stay float, how ranges are found, how
rounding is learned and samples are weighted, what the sampler corrects. How long it all takes is the preset's business.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from calib.config import QuantConfig
from gaq_export.errors import GaqError


@dataclass(frozen=True)
class Recipe:
    """One method; `apply` turns a schedule's settings into its own."""

    description: str
    apply: Callable[[QuantConfig], QuantConfig]


def _rtn(config: QuantConfig) -> QuantConfig:
    return replace(
        config,
        weight=replace(config.weight, candidates=1),
        activation=replace(config.activation, rule="minmax", symmetric=True),
        reconstruction=replace(config.reconstruction, iterations=0, start="float"),
        omega=replace(config.omega, rule="uniform"),
    )


def _adaround(config: QuantConfig) -> QuantConfig:
    return replace(config, omega=replace(config.omega, rule="uniform"))


def _tfmq(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), convention="tfmq", activation=replace(config.activation, per_step=True))


def _gac(config: QuantConfig) -> QuantConfig:
    return replace(_tfmq(config), omega=replace(config.omega, rule="gac"))


def _ptqd(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), correction=replace(config.correction, rule="ptqd"))


def _tac(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), correction=replace(config.correction, rule="tac"))


def _qdrop(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), reconstruction=replace(config.reconstruction, activations="qdrop"))


def _pqd(config: QuantConfig) -> QuantConfig:
    return replace(_qdrop(config), selection=replace(config.selection, rule="gaussian"))


def _ptq4dm(config: QuantConfig) -> QuantConfig:
    return replace(_pqd(config), activation=replace(config.activation, symmetric=True))


def _q_diffusion(config: QuantConfig) -> QuantConfig:
    learned = replace(_adaround(config), reconstruction=replace(config.reconstruction, activations="lsq"))
    return replace(learned, surgery=replace(config.surgery, split=True))


def _eda_dm(config: QuantConfig) -> QuantConfig:
    fine = replace(config.reconstruction, activations="qdrop", fine=0.8, regulariser=0.0)
    return replace(_adaround(config), reconstruction=fine, selection=replace(config.selection, rule="density"))


def _tcaq(config: QuantConfig) -> QuantConfig:
    fewer = replace(config.reconstruction, iterations=max(1, config.reconstruction.iterations // 2))
    rounds = replace(_adaround(config), reconstruction=fewer, rounds=2)
    per_step = replace(config.activation, per_step=True, logarithmic=True)
    return replace(rounds, activation=per_step, surgery=replace(config.surgery, scale_channels=8.0))


def _tdq(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), activation=replace(config.activation, per_step=True, sizes="network"))


def _adp(config: QuantConfig) -> QuantConfig:
    return replace(_adaround(config), activation=replace(config.activation, per_step=True, sizes="groups"))


def _pcr(config: QuantConfig) -> QuantConfig:
    on_its_own = replace(config.activation, per_step=True, trajectory="quantized", wide_window=(0.8, 1.0))
    return replace(_adaround(config), activation=on_its_own)


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
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise GaqError(f"Unknown recipe {name!r}. Choose one of {list(RECIPES)}.{hint}")
    return RECIPES[name]
