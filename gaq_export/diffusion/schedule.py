"""When to denoise: the noise schedule a model was trained with, and the timesteps that a sampler visits.

In: a `NoiseSchedule`, and a `SamplerSpec` (what the user chose). Out: the timesteps in the order in which they run.
Two words never mix: `t` is a training timestep (0 to T-1), `step` an index into the S sampling steps, and step 0 is the
noisiest.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from gaq_export.errors import GaqError, unknown

SAMPLER_NAMES = ("ddim", "ddim-clipped", "ddpm", "dpmpp-2m")


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """The forward process a model was trained to undo.

    Attributes:
        alpha_bar: Share of signal variance left at each training timestep, (T,) float64, falling, within (0, 1).
        clip: Largest magnitude allowed for the predicted clean image, or None for no clipping.
        variance: Which variance ancestral sampling adds, "fixed_small" or "fixed_large"; DDIM does not use it.
        last: Share of signal variance where DDIM ends: 1, or as in latent diffusion that of the first timestep.

    Raises:
        GaqError: If `alpha_bar` or `clip` is outside those bounds.
    """

    alpha_bar: torch.Tensor
    clip: float | None
    variance: str
    last: float = 1.0

    def __post_init__(self) -> None:
        # float64, because the samplers' coefficients are differences of numbers close to 1.
        a = self.alpha_bar
        if a.dim() != 1 or a.dtype != torch.float64 or len(a) == 0:
            raise GaqError(f"alpha_bar must be a float64 vector, not {a.dtype} of shape {tuple(a.shape)}.")
        if not (a.min() > 0 and a.max() < 1 and bool((a.diff() < 0).all())):
            raise GaqError(
                "alpha_bar must fall steadily and stay inside (0, 1); schedules that end in pure noise "
                "(rescale_betas_zero_snr) cannot be used with a model that predicts noise."
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise GaqError(f"The clipping range must be positive and finite, or None, not {self.clip}.")

    @property
    def num_train(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alpha_bar)


def linear_schedule(
    *,
    num_train: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    clip: float | None = 1.0,
    variance: str = "fixed_small",
) -> NoiseSchedule:
    """Make the linear-beta schedule of the DDPM paper (Ho et al. 2020, section 4).

    Args:
        num_train: T, the number of training timesteps.
        beta_start: Noise variance added at the first timestep.
        beta_end: Noise variance added at the last timestep.
        clip: Largest magnitude allowed for the predicted clean image, or None.
        variance: Variance of ancestral sampling, see `NoiseSchedule`.
    """
    betas = torch.linspace(beta_start, beta_end, num_train, dtype=torch.float32)
    alpha_bar = (1 - betas).cumprod(0).double()  # in float32, as diffusers' schedulers have it
    return NoiseSchedule(alpha_bar=alpha_bar, clip=clip, variance=variance)


def _leading(steps: int, num_train: int, offset: int = 0) -> torch.Tensor:
    """Equal strides from `offset`, diffusers' "leading" spacing with its `steps_offset`."""
    return torch.arange(steps) * (num_train // steps) + offset


def _trailing(steps: int, num_train: int) -> torch.Tensor:
    """Equal strides back from the last timestep (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    # numpy's rounding and strides, as in diffusers; its range may have one entry too many.
    falling = np.arange(num_train, 0, -num_train / steps)[:steps].round() - 1
    return torch.from_numpy(falling[::-1].astype(np.int64))


def _linspace(steps: int, num_train: int) -> torch.Tensor:
    """From the first timestep to the last, both included, rounded (table 2 there)."""
    return torch.from_numpy(np.linspace(0, num_train - 1, steps).round().astype(np.int64))


def _quad(steps: int, num_train: int) -> torch.Tensor:
    """Squares of equal strides, dense near t = 0 (Song et al. 2021, appendix D.2; Q-Diffusion on CIFAR-10).

    With many steps, several of the first squares truncate to the same timestep. The repeats stay, because the published
    protocol visits them too; without clipping, a repeated step changes nothing.
    """
    # The factor 0.8 is the published code's.
    # numpy, because torch rounds some squares to the other side of an integer than the published code does.
    squares = np.linspace(0, np.sqrt(0.8 * num_train), steps) ** 2
    return torch.from_numpy(squares.astype(np.int64))


def _beta(steps: int, num_train: int) -> torch.Tensor:
    """Quantiles of the Beta(0.6, 0.6) distribution, dense at both ends (Lee et al. 2024, arXiv 2407.12173).

    The paper's sources do not state the exponent; 0.6 is what a widely used interface calls beta.
    """
    from scipy.stats import beta  # importing it takes half a second, and only this spacing needs it

    # Quantiles of 0, 1/S, ..., (S - 1)/S: that of 1 would be T, one too many.
    return torch.from_numpy((num_train * beta.ppf(np.arange(steps) / steps, 0.6, 0.6)).astype(np.int64))


SPACINGS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "uniform": _leading,
    "from-1": partial(_leading, offset=1),  # as latent diffusion draws (Rombach et al. 2022)
    "trailing": _trailing,
    "linspace": _linspace,
    "quad": _quad,
    "beta": _beta,
}


# Their strides have one nominal length, and DDIM goes back by it; see `arrivals`.
_EVEN = re.compile(r"uniform|from-([1-9]\d{0,5})|trailing|linspace")
STEPS = 50  # unless the user says otherwise


def _spread(spacing: str) -> Callable[[int, int], torch.Tensor]:
    """Return a row of `SPACINGS`, or what "from-N" means for any other N; raise GaqError for other names."""
    match = _EVEN.fullmatch(spacing) if isinstance(spacing, str) else None  # it may come from JSON
    if match and match[1]:
        return partial(_leading, offset=int(match[1]))
    if spacing not in tuple(SPACINGS):
        raise unknown("spacing", spacing, sorted(SPACINGS))
    return SPACINGS[spacing]


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """How to draw images: which sampler, over how many steps.

    Attributes:
        name: Sampler, one of `SAMPLER_NAMES`.
        steps: S, how often the network is called for each image.
        spacing: How the steps are spread over the training timesteps, a key of `SPACINGS`, or "from-N" for strides
            from timestep N.
        eta: Noise added by DDIM, from 0 (deterministic) to 1 (as much as ancestral sampling).

    Raises:
        GaqError: If a field is outside its range.
    """

    name: str = "ddim"
    steps: int = STEPS
    spacing: str = "uniform"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SAMPLER_NAMES:
            raise unknown("sampler", self.name, SAMPLER_NAMES)
        _spread(self.spacing)
        # The fields may come from JSON, where `true` would pass for the integer 1.
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise GaqError(f"The number of sampling steps must be a whole number from 1 up, not {self.steps!r}.")
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise GaqError(f"eta must lie between 0 and 1, not {self.eta!r}.")
        if not self.name.startswith("ddim") and self.eta != 0:
            raise GaqError(f"eta belongs to DDIM; the {self.name!r} sampler takes none, so leave it at 0.")

    def __str__(self) -> str:
        """Describe the sampler in words."""
        noise = f", eta {self.eta:g}" if self.eta else ""
        return f"{self.name}, {self.steps} steps, {self.spacing} spacing{noise}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SamplerSpec":
        """Build a spec from `to_json`'s object.

        Raises:
            GaqError: If a field is unknown or its value is outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        extra = sorted(set(fields) - set(known))
        if extra:
            raise GaqError(f"Unknown sampler fields {extra}. Known fields: {known}.")
        return cls(**fields)


def timesteps(spec: SamplerSpec, num_train: int) -> torch.Tensor:
    """List the training timesteps a sampler visits, in execution order.

    Args:
        spec: The sampler's settings.
        num_train: T, the number of training timesteps.

    Returns:
        (S,) int64, noisiest first.

    Raises:
        GaqError: If there are more sampling steps than the model's timesteps allow.
    """
    most = num_train - _leaves_out_0(spec)
    if spec.steps > most:
        raise GaqError(
            f"{spec.steps} sampling steps are more than the {num_train} timesteps of the model allow {spec.name}: "
            f"choose --steps {most} or fewer."
        )
    visited = _visited(spec, num_train)
    if visited[0] >= num_train:
        raise GaqError(
            f"{spec.steps} sampling steps of {spec.spacing} spacing would begin at timestep {int(visited[0])}, and the "
            f"model's last is {num_train - 1}: choose fewer --steps, or another --spacing."
        )
    return visited


def _leaves_out_0(spec: SamplerSpec) -> bool:
    """Whether timestep 0 is left out and S + 1 are spread: by DPM-Solver++, which has nothing left to do there."""
    return spec.name == "dpmpp-2m" and spec.spacing != "trailing" and _EVEN.fullmatch(spec.spacing) is not None


def _visited(spec: SamplerSpec, num_train: int) -> torch.Tensor:
    """Return what `timesteps` returns, unless it raises."""
    left_out = int(_leaves_out_0(spec))
    return _spread(spec.spacing)(spec.steps + left_out, num_train)[left_out:].flip(0)  # spacings rise, sampling falls


def arrivals(spec: SamplerSpec, num_train: int) -> torch.Tensor:
    """List the training timesteps that DDIM's steps lead to, (S,) int64; -1 is the end.

    Even spacings go back by T // S, as in diffusers, and not to the next visited timestep: that differs where strides
    were rounded, in "trailing" and "linspace". Others go to the next timestep.
    """
    visited = timesteps(spec, num_train)
    if _EVEN.fullmatch(spec.spacing):
        return (visited - num_train // spec.steps).clamp(min=-1)
    return torch.cat([visited[1:], torch.tensor([-1])])


def default_sampler(num_train: int, name: str = "ddim", spacing: str = "uniform", eta: float = 0.0) -> SamplerSpec:
    """Return a sampler of `STEPS` steps, or of fewer where a model of T timesteps does not suit so many.

    "leading" strides are whole numbers: 50 steps over 60 timesteps would leave out the noisiest ten, and images do not
    begin there. The first step is therefore in the last tenth.

    Args:
        num_train: T, the number of training timesteps.
        name: Sampler.
        spacing: How its steps are spread.
        eta: Noise added by DDIM.

    Raises:
        GaqError: If not even one step is possible.
    """
    possible = []
    for steps in range(min(STEPS, num_train), 0, -1):
        spec = SamplerSpec(name=name, steps=steps, spacing=spacing, eta=eta)
        if steps + _leaves_out_0(spec) <= num_train and (first := int(_visited(spec, num_train)[0])) < num_train:
            if first >= 0.9 * (num_train - 1):
                return spec
            possible.append(spec)
    if not possible:
        raise GaqError(f"{name} with {spacing} spacing cannot take a single step over {num_train} timesteps.")
    return possible[0]


def under_guidance(spec: SamplerSpec, schedule: NoiseSchedule, scale: float) -> SamplerSpec:
    """Return a sampler that suits guidance of this scale: `ddim-clipped` for DDIM, if the schedule clips."""
    # Guidance makes epsilon large; where x0 is clipped and epsilon is not, x drifts, see `samplers.ddim_clipped`.
    drifts = spec.name == "ddim" and schedule.clip is not None and scale != 1
    return dataclasses.replace(spec, name="ddim-clipped") if drifts else spec
