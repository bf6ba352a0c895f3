"""Every sampler is a table of coefficients, one row a step, and one update applies a row.

In: a noise schedule and a `SamplerSpec`. Out: `Coefficients` for every step. They are computed in float64 from
`alpha_bar` at the timesteps actually visited, so uneven spacings need no special case. The loop in PyTorch
(`gaq_export.diffusion.loop`) and an exported step (`gaq_export.graph.step`) use the same table.

Letters, as in Ho et al. 2020 and Song et al. 2021: `a` and `a_prev` are alpha_bar at this and the next visited
timestep (1 after the last, unless the schedule says otherwise), `x0` the predicted clean image, `epsilon` the
predicted noise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.correction import Correction
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, timesteps
from gaq_export.errors import GaqError


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """One step of a sampler, linear but for the clipping of x0.

        epsilon = gain * (epsilon - bias)
        x0 = clip(x_to_clean * x - epsilon_to_clean * epsilon)
        x_next = keep * x + clean * x0 + direction * epsilon + previous * (x0 before) + fresh * noise - shift

    As in diffusers, clipping x0 leaves epsilon as it was; in `ddim_clipped`, `keep` takes epsilon's place. `gain`,
    `bias` and `shift` have a value for each channel, (C,), or are () without a noise correction (`calib.correction`).
    """

    x_to_clean: float
    epsilon_to_clean: float
    keep: float = 0.0
    clean: float = 0.0
    direction: float = 0.0
    previous: float = 0.0
    fresh: float = 0.0
    gain: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()


def table(schedule: NoiseSchedule, spec: SamplerSpec, correction: Correction | None = None) -> list[Coefficients]:
    """Return the coefficients of every step, noisiest first.

    Args:
        schedule: what the network was trained with.
        spec: the sampler.
        correction: of a quantized network's noise, a row for each step.

    Raises:
        GaqError: the sampler cannot be used with this schedule, or the correction has other steps.
    """
    visited = timesteps(spec, schedule.num_train)
    rows = SAMPLERS[spec.name]([*schedule.alpha_bar[visited].tolist(), 1.0], schedule, spec)
    if correction is None:
        return rows
    if len(correction.gain) != len(rows):
        raise GaqError(f"The correction has {len(correction.gain)} steps, the sampler {len(rows)}: calibrate again.")
    return [_corrected(row, correction, step) for step, row in enumerate(rows)]


def _corrected(row: Coefficients, correction: Correction, step: int) -> Coefficients:
    """Return the row with the correction of its step, and less noise by as much as the rest of the error brings.

    The rest's variance reaches x_next times the square of epsilon's whole factor; where the sampler adds less noise
    than that, it adds none (PTQD, variance schedule calibration). DDIM's direction keeps the total.
    """
    factor = row.direction - row.clean * row.epsilon_to_clean
    left = math.sqrt(max(row.fresh**2 - factor**2 * correction.variance[step], 0.0))
    length = math.sqrt(row.direction**2 + row.fresh**2 - left**2) if row.direction else 0.0
    direction = math.copysign(length, row.direction)
    after = (*correction.shift[1:], (0.0,) * len(correction.shift[0]))[step]
    return replace(
        row,
        fresh=left,
        direction=direction,
        gain=correction.gain[step],
        bias=correction.bias[step],
        shift=after,
    )


def update(
    row: Coefficients, clip: float | None, x: Tensor, epsilon: Tensor, previous: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the next x and this step's x0, see `Coefficients`; `fresh` may be None where a row needs none."""
    if row.gain:
        epsilon = _channels(row.gain, x) * (epsilon - _channels(row.bias, x))
    clean = row.x_to_clean * x - row.epsilon_to_clean * epsilon
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    parts = (
        (row.keep, x),
        (row.clean, clean),
        (row.direction, epsilon),
        (row.previous, previous),
        (row.fresh, fresh),
    )
    terms = [factor * part for factor, part in parts if factor and part is not None]
    total = sum(terms[1:], start=terms[0])
    return total - _channels(row.shift, x) if any(row.shift) else total, clean


def _channels(values: tuple[float, ...], x: Tensor) -> Tensor:
    """Return values of channels as (1, C, 1, 1)."""
    return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)


def ddim(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DDIM (Song et al. 2021, equations 12 and 16).

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: Where it ends instead.
        spec: eta.
    """
    rows = []
    for a, a_prev in itertools.pairwise((*alpha_bar[:-1], schedule.last)):
        sigma = spec.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))
        rows.append(_row(a, clean=math.sqrt(a_prev), direction=direction, fresh=sigma))
    return rows


def ddim_clipped(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DDIM whose noise is what x holds beside the clipped x0, as in Dhariwal and Nichol 2021; arguments as for `ddim`.

    Guidance makes epsilon large. Where x0 is clipped and epsilon is not, x drifts away from what the network knows.
    """
    rows = []
    for a, row in zip(alpha_bar, ddim(alpha_bar, schedule, spec), strict=False):
        keep = row.direction / math.sqrt(1 - a)  # epsilon = (x - sqrt(a) x0) / sqrt(1 - a)
        rows.append(replace(row, keep=keep, clean=row.clean - keep * math.sqrt(a), direction=0.0))
    return rows


def ddpm(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """Ancestral sampling (Ho et al. 2020, equations 6 and 7), with the chain shortened to the visited timesteps.

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: The noise schedule the network was trained with, its `variance` a key of `VARIANCES`.
        spec: Not used.

    Raises:
        GaqError: If the schedule's variance is not one of `VARIANCES`.
    """
    if schedule.variance not in VARIANCES:
        raise GaqError(
            f"The ddpm sampler needs a variance out of {sorted(VARIANCES)}, but this model's scheduler says "
            f"{schedule.variance!r}. Use the ddim sampler, which needs none."
        )
    rows = []
    for a, a_prev in itertools.pairwise(alpha_bar):
        beta = 1 - a / a_prev
        sigma = math.sqrt(VARIANCES[schedule.variance](a, a_prev)) if a_prev < 1 else 0.0
        clean = math.sqrt(a_prev) * beta / (1 - a)
        rows.append(_row(a, keep=math.sqrt(1 - beta) * (1 - a_prev) / (1 - a), clean=clean, fresh=sigma))
    return rows


def dpmpp_2m(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, from the clean image of the step before.

    The first and the last step are of first order: the one has no step before it, the other ends without noise.

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: Not used.
        spec: Not used.
    """
    log_snr = [0.5 * math.log(a / (1 - a)) for a in alpha_bar[:-1]]  # lambda
    widths = [after - before for before, after in itertools.pairwise(log_snr)]  # h
    rows = []
    for i, (a, a_prev) in enumerate(itertools.pairwise(alpha_bar)):
        last = i == len(widths)
        shrink = math.sqrt((1 - a_prev) / (1 - a))
        gain = math.sqrt(a_prev) * (1.0 if last else -math.expm1(-widths[i]))
        half = 0.0 if last or i == 0 or not widths[i - 1] else widths[i] / (2 * widths[i - 1])  # 1 / 2r
        rows.append(_row(a, keep=shrink, clean=gain * (1 + half), previous=-gain * half))
    return rows


SAMPLERS: dict[str, Callable[[Sequence[float], NoiseSchedule, SamplerSpec], list[Coefficients]]] = {
    "ddim": ddim,
    "ddim-clipped": ddim_clipped,
    "ddpm": ddpm,
    "dpmpp-2m": dpmpp_2m,
}

# Variance of the noise that ancestral sampling adds: the two bounds of Ho et al. 2020, section 3.2.
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "fixed_small": lambda a, a_prev: (1 - a_prev) / (1 - a) * (1 - a / a_prev),
    "fixed_large": lambda a, a_prev: 1 - a / a_prev,
}


def _row(a: float, **factors: float) -> Coefficients:
    plain = Coefficients(x_to_clean=1 / math.sqrt(a), epsilon_to_clean=math.sqrt((1 - a) / a))
    return replace(plain, **factors)  # type: ignore[arg-type]
