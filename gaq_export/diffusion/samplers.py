"""Every sampler is a table of coefficients, one row a step, and one update applies a row.

In: a noise schedule and a `SamplerSpec`. Out: `Coefficients` for every step. They are computed in float64 from
`alpha_bar` at the timesteps actually visited, so uneven spacings need no special case. The loop in PyTorch
(`gaq_export.diffusion.loop`) and an exported step (`gaq_export.graph.step`) use the same table.

Letters, as in Ho et al. 2020 and Song et al. 2021: `a` and `a_prev` are alpha_bar at this timestep and at the one that
the step leads to, mostly the next visited (1 after the last, unless the schedule says otherwise), `x0` the predicted
clean image, `epsilon` the predicted noise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.correction import Correction
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, arrivals, timesteps
from gaq_export.errors import GaqError


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """One step of a sampler, linear except for the clipping of x0.

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
    # A sampler ends at the clean image, whose share of signal is 1.
    rows = SAMPLERS[spec.name]([*schedule.alpha_bar[visited].tolist(), 1.0], schedule, spec)
    if correction is None:
        return rows
    if len(correction.gain) != len(rows):
        raise GaqError(f"The correction has {len(correction.gain)} steps, the sampler {len(rows)}: calibrate again.")
    return [_corrected(row, correction, step) for step, row in enumerate(rows)]


def _corrected(row: Coefficients, correction: Correction, step: int) -> Coefficients:
    """Return the row with its step's correction, and with less fresh noise, since the remaining error is noise too.

    That error's variance reaches x_next times the square of epsilon's total factor, and the sampler adds that much
    less, or none if it would add less than that (PTQD, variance schedule calibration). DDIM's direction grows instead,
    so that the total variance stays the same.
    """
    # epsilon reaches x_next directly and through x0.
    factor = row.direction - row.clean * row.epsilon_to_clean
    left = math.sqrt(max(row.fresh**2 - factor**2 * correction.variance[step], 0.0))
    length = math.sqrt(row.direction**2 + row.fresh**2 - left**2) if row.direction else 0.0
    direction = math.copysign(length, row.direction)
    # x is corrected as the next step will read it, so that step's shift belongs here. The first step reads pure noise,
    # which has no drift, and nothing reads x after the last.
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
        clean = clean.clamp(-clip, clip)  # and epsilon stays as it was, as in diffusers
    parts = (
        (row.keep, x),
        (row.clean, clean),
        (row.direction, epsilon),
        (row.previous, previous),
        (row.fresh, fresh),
    )
    # Terms with a factor of 0 are left out: `fresh` is None there, and 0 times a tensor still costs a pass over it.
    terms = [factor * part for factor, part in parts if factor and part is not None]
    total = sum(terms[1:], start=terms[0])
    return total - _channels(row.shift, x) if any(row.shift) else total, clean


def _channels(values: tuple[float, ...], x: Tensor) -> Tensor:
    """Return one value for each channel as (1, C, 1, 1)."""
    return torch.tensor(values, dtype=x.dtype).to(x.device).reshape(1, -1, 1, 1)


def ddim(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DDIM (Song et al. 2021, equations 12 and 16).

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: its `last` is where DDIM ends, in place of 1.
        spec: the sampler, for its eta and where its steps lead, see `schedule.arrivals`.
    """
    rows = []
    reached = [float(schedule.alpha_bar[t]) if t >= 0 else schedule.last for t in arrivals(spec, schedule.num_train)]
    for a, a_prev in zip(alpha_bar[:-1], reached, strict=True):
        # Equation 16: eta 1 is the variance of ancestral sampling, eta 0 is deterministic.
        sigma = spec.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        # Rounding may take the difference just below 0, hence max.
        direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))
        rows.append(_row(a, clean=math.sqrt(a_prev), direction=direction, fresh=sigma))
    return rows


def ddim_clipped(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DDIM with epsilon computed again from x and the clipped x0 (Dhariwal and Nichol 2021); arguments as for `ddim`.

    Guidance makes epsilon large. Where x0 is clipped and epsilon is not, x drifts away from what the network was
    trained on.
    """
    rows = []
    for a, row in zip(alpha_bar, ddim(alpha_bar, schedule, spec), strict=False):  # alpha_bar has its end as well
        keep = row.direction / math.sqrt(1 - a)  # epsilon = (x - sqrt(a) x0) / sqrt(1 - a)
        rows.append(replace(row, keep=keep, clean=row.clean - keep * math.sqrt(a), direction=0.0))
    return rows


def ddpm(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """Ancestral sampling (Ho et al. 2020, equations 6 and 7), with the chain shortened to the visited timesteps.

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: the noise schedule that the network was trained with, its `variance` a key of `VARIANCES`.
        spec: not used.

    Raises:
        GaqError: the schedule's variance is not one of `VARIANCES`.
    """
    if schedule.variance not in VARIANCES:
        raise GaqError(
            f"The ddpm sampler needs a variance out of {sorted(VARIANCES)}, but this model's scheduler says "
            f"{schedule.variance!r}. Use the ddim sampler, which needs none."
        )
    rows = []
    for a, a_prev in itertools.pairwise(alpha_bar):
        beta = 1 - a / a_prev  # of the shortened chain
        # The last step adds no noise (algorithm 2); "fixed_large" alone would add some.
        sigma = math.sqrt(VARIANCES[schedule.variance](a, a_prev)) if a_prev < 1 else 0.0
        clean = math.sqrt(a_prev) * beta / (1 - a)
        rows.append(_row(a, keep=math.sqrt(1 - beta) * (1 - a_prev) / (1 - a), clean=clean, fresh=sigma))
    return rows


def dpmpp_2m(alpha_bar: Sequence[float], schedule: NoiseSchedule, spec: SamplerSpec) -> list[Coefficients]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, with the help of the previous step's clean image.

    The first and the last step are of first order: the first has no previous step, and the last ends without noise.

    Args:
        alpha_bar: at the visited timesteps, noisiest first, and 1 at the end.
        schedule: not used.
        spec: not used.
    """
    log_snr = [0.5 * math.log(a / (1 - a)) for a in alpha_bar[:-1]]  # lambda
    widths = [after - before for before, after in itertools.pairwise(log_snr)]  # h
    rows = []
    for i, (a, a_prev) in enumerate(itertools.pairwise(alpha_bar)):
        last = i == len(widths)
        shrink = math.sqrt((1 - a_prev) / (1 - a))  # sigma at the next timestep over sigma at this one
        # alpha (1 - exp(-h)); the last step ends at an infinite log-SNR, where the bracket is 1.
        gain = math.sqrt(a_prev) * (1.0 if last else -math.expm1(-widths[i]))
        # A repeated timestep ("quad" has some) has width 0: no slope can be taken across it.
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
    # x = sqrt(a) x0 + sqrt(1 - a) epsilon, solved for x0
    plain = Coefficients(x_to_clean=1 / math.sqrt(a), epsilon_to_clean=math.sqrt((1 - a) / a))
    return replace(plain, **factors)  # type: ignore[arg-type]
