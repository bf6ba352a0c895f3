"""Presets, which decide how long a calibration takes, and the options that a user sets beside them.

In: the name of a preset and `CalibrationOptions`. Out: a `Preset`, whose `QuantConfig` says all that `calib` needs to
know. Precedence: an option, then the recipe, then the preset.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from calib.choices import BudgetUnit, RoundingStart, SoftmaxOver
from calib.config import (
    ActivationConfig,
    MixedConfig,
    OmegaConfig,
    QuantConfig,
    ReconstructionConfig,
)
from gaq_export.errors import GaqError, unknown
from gaq_export.quantize.recipes import find_recipe


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How many images to calibrate with, and how.

    Attributes:
        description: One line for a list of presets.
        images: Trajectories to collect; each gives one sample at every sampling step.
        config: Everything else.
        published: Whether a known model takes as many images as in its paper, see `with_images`.
    """

    description: str
    images: int
    config: QuantConfig
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What the user sets beside the preset; None leaves it to the recipe, or to the preset.

    Attributes:
        wbits: Bits of a weight.
        abits: Bits of an activation; of several widths each sampling step takes the one it needs (`calib.step_bits`).
        recipe: A published method, a key of `RECIPES`.
        omega: How samples are weighted, a member of `calib.choices.OmegaRule`.
        convention: Which layers stay float, a member of `calib.choices.Convention`.
        correction: What the sampler corrects of the predicted noise, a member of `calib.choices.CorrectionRule`.
        keep_float: Shell patterns of further layers to keep float.
        per_step: Whether every sampling step has its own activation grids.
        symmetric: Whether every activation grid has 0 in the middle.
        budget: Chooses the bits of each layer within it, as "5bits" (on average), "2.5MB", "300Gbit-ops" or "12ms".
        iterations: Iterations of a block.
        seed: Seed of everything random.
    """

    wbits: int = 4
    abits: int | tuple[int, ...] = 8
    recipe: str | None = None
    omega: str | None = None
    convention: str | None = None
    correction: str | None = None
    keep_float: tuple[str, ...] = ()
    per_step: bool | None = None
    symmetric: bool | None = None
    budget: str | None = None
    iterations: int | None = None
    seed: int = 0


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        description="a smoke test: every stage runs, nothing is learned",
        images=4,
        config=QuantConfig(
            reconstruction=ReconstructionConfig(
                iterations=4, batch=4, learning_rate=1e-2, start=RoundingStart.GPTQ, activation_iterations=4
            ),
            omega=OmegaConfig(meta_steps=1, batch=4, validation_batch=2),
            activation=ActivationConfig(batches=2, batch=4),
            weight_steps=2,
            micro_batch=4,
        ),
    ),
    "fast": Preset(
        description="minutes on two cores for ddpm-mnist",
        images=64,
        config=QuantConfig(
            # From GPTQ's rounding and with 100 times the papers' learning rate, 200 iterations come close to 20 000:
            # see docs/results/schedules-ddpm-mnist.md.
            reconstruction=ReconstructionConfig(
                iterations=200, batch=8, learning_rate=0.1, start=RoundingStart.GPTQ, activation_iterations=200
            ),
            omega=OmegaConfig(  # the best of docs/results/omega-scan-ddpm-mnist.md, if by little
                softmax=SoftmaxOver.SET,
                meta_steps=6,
                meta_learning_rate=0.1,
                inner_step=0.1,
                batch=32,
                validation_batch=2,
            ),
            activation=ActivationConfig(batches=60),
            weight_steps=10,
        ),
    ),
    "paper": Preset(
        description="20 000 iterations a block, batch 32, as published",
        images=256,  # unless the model's paper says otherwise, see `with_images`
        config=QuantConfig(),  # its defaults are the published schedule of TFMQ-DM
        published=True,
    ),
}


def preset(name: str, options: CalibrationOptions = CalibrationOptions()) -> Preset:
    """Return the preset `name` with the user's options put in.

    Raises:
        GaqError: There is no such preset or recipe, or the budget cannot be read.
        CalibError: Bits outside 2 to 8, or an unknown omega rule, convention or correction.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    base = PRESETS[name]
    # The recipe first, so that an option has the last word.
    config = base.config if options.recipe is None else find_recipe(options.recipe).apply(base.config)
    widths = {options.abits} if isinstance(options.abits, int) else set(options.abits)
    # The widest is the plan's width; steps that need fewer bits take a narrower one (`calib.step_bits`).
    widest, *narrower = sorted(widths, reverse=True)
    config = replace(
        config,
        weight=replace(config.weight, bits=options.wbits),
        activation=replace(
            config.activation,
            bits=widest,
            narrower=tuple(narrower),
            **_set(per_step=options.per_step, symmetric=options.symmetric),
        ),
        reconstruction=replace(config.reconstruction, **_set(iterations=options.iterations)),
        omega=replace(config.omega, **_set(rule=options.omega)),
        correction=replace(config.correction, **_set(rule=options.correction)),
        mixed=config.mixed if options.budget is None else _within(config.mixed, options.budget),
        **_set(convention=options.convention),
        keep_float=options.keep_float,
        seed=options.seed,
    )
    return replace(base, config=config)


def with_images(chosen: Preset, requested: int | None, published: int) -> Preset:
    """Return a preset with the number of images that suits a model.

    Args:
        chosen: The preset.
        requested: The user's number, which takes precedence, if there is one.
        published: The number in the model's paper, which a `published` preset takes.

    Raises:
        GaqError: The requested number is less than 1.
    """
    if requested is not None and requested < 1:
        raise GaqError(f"Found {requested} trajectories to collect; ask for 1 or more.")
    return replace(chosen, images=requested or (published if chosen.published else chosen.images))


def parse_widths(text: str) -> tuple[int, ...]:
    """Read "8" or "4,8".

    >>> parse_widths("4,8")
    (4, 8)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise GaqError(f"Found activation bits {text!r}; write them as 8, or as 4,8.") from error


def _within(mixed: MixedConfig, budget: str) -> MixedConfig:
    """Return settings for a budget, as "5bits", "2.5MB", "300Gbit-ops" or "12ms".

    >>> _within(MixedConfig(), "2.5 mb").budget, _within(MixedConfig(), "2.5 mb").unit
    (2.5, 'MB')
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*([A-Za-z-]+)", budget.strip())
    units = {unit.lower(): unit for unit in BudgetUnit}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise GaqError(f"Found a budget of {budget!r}; write it as 5bits, 2.5MB, 300Gbit-ops or 12ms.")
    return replace(mixed, budget=float(match[1]), unit=units[match[2].lower()])


def _set(**options: Any) -> dict[str, Any]:
    """Return the options that the user set."""
    return {name: option for name, option in options.items() if option is not None}
