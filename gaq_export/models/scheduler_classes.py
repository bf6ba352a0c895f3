"""What each of diffusers' schedulers becomes here: one of our samplers, another that is as good, or a refusal.

A network belongs to the scheduler that it was trained for, whose class alone says what it predicts and at which times.
`CLASSES` is the whole decision; networks that predict something else than noise will get their rows here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SchedulerClass:
    """One class.

    Attributes:
        sampler: our sampler for its networks; empty if they are refused.
        leading: our sampler with the spacing "leading", if that takes the very steps of the class; else empty.
        eta: how much noise that sampler adds, see `SamplerSpec`.
        spacing: diffusers' name of its spacing, where no field says it.
        instead: why ours is not the class's own sampler, as a relative clause; empty if it is. {T} becomes the number
            of timesteps.
        refused: why its networks are refused, as a predicate.
        defaults: the class's own defaults, where diffusers shows none because a package that it needs is missing.
    """

    sampler: str = ""
    leading: str = ""
    eta: float = 0.0
    spacing: str = "leading"
    instead: str = ""
    refused: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


NOT_HERE = "which is not among the samplers here"
# In 50 steps it draws worse than DDIM, with "fixed_large" by far (Song et al. 2021, table 1), and all of a model's
# timesteps make a calibration 20 times as long.
_DDPM = "which draws well in hundreds of steps alone (--sampler ddpm --steps {T} is the same)"
_EULER = "which visits fractions of timesteps"
_FLOW = "is for flow matching, where the network predicts a velocity"
_SIGMA = "is for networks that take a noise level and not a timestep"
_DISTILLED = "is for networks distilled to a few steps, which other samplers than its own draw badly"
_TOKENS = "draws discrete tokens and not images"
_BACKWARDS = "goes from images to noise"
_OWN_SCHEDULE = "has a noise schedule of its own kind"


def _refused(why: str, *names: str) -> dict[str, SchedulerClass]:
    return {f"{name}Scheduler": SchedulerClass(refused=why) for name in names}


def _drawn(sampler: str, instead: str, *names: str, eta: float = 0.0) -> dict[str, SchedulerClass]:
    return {f"{name}Scheduler": SchedulerClass(sampler=sampler, instead=instead, eta=eta) for name in names}


# diffusers needs torchsde to show this class, and we only its fields.
_DPM_SDE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}

CLASSES: dict[str, SchedulerClass] = {
    **_drawn("ddim", "", "DDIM", "DDIMParallel"),
    **_drawn("dpmpp-2m", "", "DPMSolverMultistep"),
    **_drawn("ddim", _DDPM, "DDPM", "DDPMParallel"),
    # In x / sqrt(alpha_bar), Euler's method is DDIM, and its ancestral form DDIM with eta 1.
    "EulerDiscreteScheduler": SchedulerClass(sampler="dpmpp-2m", leading="ddim", instead=_EULER),
    "EulerAncestralDiscreteScheduler": SchedulerClass(sampler="ddim", leading="ddim", eta=1.0, instead=_EULER),
    **_drawn("ddim", NOT_HERE, "KDPM2AncestralDiscrete", eta=1.0),
    # docs/results/schedulers.md has how close each comes to the limit of many steps.
    **_drawn("dpmpp-2m", NOT_HERE, "PNDM"),
    **_drawn("dpmpp-2m", NOT_HERE, "DEISMultistep", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"),
    **_drawn("dpmpp-2m", NOT_HERE, "SASolver", "UniPCMultistep"),
    "DPMSolverSinglestepScheduler": SchedulerClass(sampler="dpmpp-2m", spacing="linspace", instead=NOT_HERE),
    "DPMSolverSDEScheduler": SchedulerClass(sampler="dpmpp-2m", instead=NOT_HERE, defaults=_DPM_SDE),
    **_refused(_FLOW, "FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
    **_refused(_FLOW, "Helios", "HeliosDMD", "LTXEulerAncestralRF", "MiniMaxH3", "Piflow", "RFD4Proteina", "SCM"),
    **_refused(_SIGMA, "CosineDPMSolverMultistep", "EDMDPMSolverMultistep", "EDMEuler", "KarrasVe", "ScoreSdeVe"),
    **_refused(_SIGMA, "ScoreSdeVp"),
    **_refused(_DISTILLED, "CMStochasticIterative", "LCM", "TCD"),
    **_refused(_TOKENS, "Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    **_refused(_BACKWARDS, "DDIMInverse", "DPMSolverMultistepInverse"),
    **_refused(_OWN_SCHEDULE, "CogVideoXDDIM", "CogVideoXDPM", "DDPMWuerstchen", "IPNDM", "UnCLIP"),
    **_refused("fills in masked images", "RePaint"),
}

# What changes which noise levels are visited, or the solver, and the value with which it does not. diffusers takes the
# further values of the last two for the same solver.
NOISE_LEVELS: dict[str, tuple[object, ...]] = {
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (float("-inf"),),
    "interpolation_type": ("linear",),
}
SOLVER: dict[str, tuple[object, ...]] = {
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
}
