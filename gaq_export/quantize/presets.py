"""Calibration schedules by name: how many images, and how long each block is fitted."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calib.config import BUDGET_UNITS, ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from gaq_export.errors import GaqError
from gaq_export.quantize.recipes import find_recipe


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A calibration schedule.

    Attributes:
        images: trajectories to collect; each gives one sample at every sampling step.
        config: the rest, its bits and seed still at their defaults.
        published: whether a known model's own number of images comes first.
    """

    images: int
    config: QuantConfig
    description: str
    published: bool = False


def _tiny() -> Preset:
    config = QuantConfig(
        reconstruction=ReconstructionConfig(
            iterations=4, batch=4, learning_rate=1e-2, start="gptq", activation_iterations=4
        ),
        omega=OmegaConfig(meta_steps=1, batch=4, validation_batch=2),
        activation=ActivationConfig(batches=2, batch=4),
        weight_steps=2,
        micro_batch=4,
    )
    return Preset(images=4, config=config, description="a smoke test: every stage runs, nothing is learned")


def _fast() -> Preset:
    config = QuantConfig(
        reconstruction=ReconstructionConfig(
            iterations=200, batch=8, learning_rate=0.1, start="gptq", activation_iterations=200
        ),
        omega=OmegaConfig(  # the best of docs/results/omega-scan-ddpm-mnist.md, if by little
            softmax="set", meta_steps=6, meta_learning_rate=0.1, inner_step=0.1, batch=32, validation_batch=2
        ),
        activation=ActivationConfig(batches=60),
        weight_steps=10,
    )
    return Preset(images=64, config=config, description="minutes on two cores for ddpm-mnist")


def _paper() -> Preset:
    description = "20 000 iterations a block, batch 32, as published"
    return Preset(images=256, config=QuantConfig(), description=description, published=True)


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": _tiny, "fast": _fast, "paper": _paper}


def preset(
    name: str,
    *,
    wbits: int = 4,
    abits: int | Sequence[int] = 8,
    recipe: str | None = None,
    omega: str | None = None,
    convention: str | None = None,
    correction: str | None = None,
    keep_float: tuple[str, ...] = (),
    per_step: bool | None = None,
    symmetric: bool | None = None,
    budget: str | None = None,
    seed: int = 0,
) -> Preset:
    """Return the preset `name` with the user's choices filled in; what is None stays the recipe's, or the preset's.

    Of several `abits` each sampling step takes its own (`calib.step_bits`).

    Raises:
        GaqError: there is no such preset or recipe, or the budget is not one.
        CalibError: bits outside 2 to 8, or an unknown omega rule, convention or correction.
    """
    if name not in PRESETS:
        raise GaqError(f"Unknown preset {name!r}. Choose one of {list(PRESETS)}.")
    chosen = PRESETS[name]()
    c = chosen.config if recipe is None else find_recipe(recipe).apply(chosen.config)
    most, *narrower = sorted({abits} if isinstance(abits, int) else set(abits), reverse=True)
    given = _given(per_step=per_step, symmetric=symmetric)
    config = replace(
        c,
        weight=replace(c.weight, bits=wbits),
        activation=replace(c.activation, bits=most, narrower=tuple(narrower), **given),
        omega=replace(c.omega, **_given(rule=omega)),
        correction=replace(c.correction, **_given(rule=correction)),
        mixed=c.mixed if budget is None else replace(c.mixed, **_budget(budget)),
        **_given(convention=convention),
        keep_float=keep_float,
        seed=seed,
    )
    return replace(chosen, config=config)


def of_images(chosen: Preset, asked: int | None, published: int) -> Preset:
    """Return the preset with as many images as `asked` for, or if it goes by the papers as many as they take."""
    return replace(chosen, images=asked or (published if chosen.published else chosen.images))


def parse_widths(text: str) -> tuple[int, ...]:
    """Read "8" or "4,8".

    >>> parse_widths("4,8")
    (4, 8)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise GaqError(f"Found activation bits {text!r}; write them as 8, or as 4,8.") from error


def _budget(text: str) -> dict[str, Any]:
    """Read "5bits", "2.5MB", "300Gbit-ops" or "12ms".

    >>> _budget("2.5 MB")
    {'budget': 2.5, 'unit': 'MB'}
    """
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z-]+)", text.strip())
    units = {unit.lower(): unit for unit in BUDGET_UNITS}
    if found is None or found[2].lower() not in units or found[1].count(".") > 1 or float(found[1]) == 0:
        raise GaqError(f"Found a budget of {text!r}; write it as 5bits, 2.5MB, 300Gbit-ops or 12ms.")
    return {"budget": float(found[1]), "unit": units[found[2].lower()]}


def _given(**choices: Any) -> dict[str, Any]:
    return {name: choice for name, choice in choices.items() if choice is not None}
