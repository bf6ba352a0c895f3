"""Read the `scheduler_config.json` of a diffusers folder: the noise schedule, and how the model draws by itself.

In: the config. Out: a `SchedulerReading`. What a class becomes is in `scheduler_classes`; its own defaults fill in what
the config leaves out, and diffusers' `DDPMScheduler` computes the numbers, so that images agree with its pipelines.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from pydantic import Field

from calib.errors import CalibError
from calib.records import Positive, check_record
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, default_sampler
from gaq_export.errors import GaqError
from gaq_export.models.json_file import read_json
from gaq_export.models.scheduler_classes import CLASSES, NOISE_LEVELS, NOT_HERE, SOLVER, SchedulerClass

_Share = Annotated[float, Field(gt=0, lt=1)]
# The names of diffusers' spacings; "leading" has an offset beside it.
_Spacing = Literal["leading", "trailing", "linspace"]
_Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SchedulerReading:
    """What a scheduler config says.

    Attributes:
        schedule: the noise schedule that the network was trained with.
        sampler: how the model draws unless the user says otherwise.
        instead: why that is not what the config names, as half a sentence; empty if it is.
    """

    schedule: NoiseSchedule
    sampler: SamplerSpec
    instead: str = ""


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """The fields that count, of all classes; a class without one has the default here, and any others do not matter."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    beta_start: _Share = 1e-4
    beta_end: _Share = 2e-2
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear"
    trained_betas: list[_Share] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: _Variance | None = None
    clip_sample: bool = False
    clip_sample_range: Positive = 1.0
    thresholding: bool = False
    set_alpha_to_one: bool = True
    timestep_spacing: _Spacing = "leading"
    steps_offset: Annotated[int, Field(ge=0, lt=100_000)] = 0
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    use_flow_sigmas: bool | None = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = float("-inf")
    interpolation_type: str = "linear"
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"


def read_scheduler(source: str | Path | Mapping[str, Any], where: object = "") -> SchedulerReading:
    """Read a diffusers scheduler config.

    Args:
        source: The config as a mapping, its JSON file, or the folder that holds `scheduler_config.json`.
        where: What messages call a mapping.

    Raises:
        GaqError: If the file is missing or unreadable, a field is of another kind or out of range, or the model is
            one that cannot be drawn, above all if it predicts anything but noise.
    """
    if isinstance(source, Mapping):
        config, where = source, where or "The scheduler config"
    else:
        config, where = read_scheduler_config(Path(source)), where or source
    name, kind = _class_of(config, where)
    found = _fields(config, name, kind, where)
    _refuse(found, where)
    leading = f"from-{found.steps_offset}" if found.steps_offset else "uniform"
    spacing = leading if found.timestep_spacing == "leading" else found.timestep_spacing
    instead = _instead(found, name, kind)
    ours = kind.sampler if instead or not kind.leading else kind.leading
    try:
        schedule = _noise_schedule(found)
        sampler = default_sampler(schedule.num_train, ours, spacing=spacing, eta=kind.eta)
    except GaqError as error:
        raise GaqError(f"{where}: {error}") from None
    return SchedulerReading(schedule=schedule, sampler=sampler, instead=instead)


def schedule_from_scheduler_config(source: str | Path | Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule of a scheduler config, see `read_scheduler`."""
    return read_scheduler(source).schedule


def _class_of(config: Mapping[str, Any], where: object) -> tuple[str, SchedulerClass]:
    """Return the class that a config names; `DDIMScheduler` where it names none but says that it predicts noise."""
    name = config.get("_class_name")
    if name is None and config.get("prediction_type") == "epsilon":
        name = "DDIMScheduler"
    if name is None:
        raise GaqError(
            f"{where} has no _class_name, so what the network predicts is not known: name the diffusers scheduler that "
            'it was trained for, or add "prediction_type": "epsilon" if it predicts noise.'
        )
    kind = CLASSES.get(name) if isinstance(name, str) else None
    supported = ", ".join(known.removesuffix("Scheduler") for known, row in CLASSES.items() if row.sampler)
    if kind is None:
        raise GaqError(
            f"{where}: _class_name is {name!r:.60}, which is no scheduler of a network that predicts noise. Supported "
            f"are those of diffusers {diffusers.__version__} called {supported}."
        )
    if kind.refused:
        raise GaqError(
            f"{where}: {name} {kind.refused}; networks must predict noise at whole timesteps. Supported are the "
            f"schedulers {supported}."
        )
    return name, kind


def _fields(config: Mapping[str, Any], name: str, kind: SchedulerClass, where: object) -> _Fields:
    """Return the config's fields that the class takes, and its defaults for the others."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.items()
    defaults = kind.defaults or {key: parameter.default for key, parameter in parameters if key != "self"}
    known = {field.name for field in fields(_Fields)} & defaults.keys()
    values = {"timestep_spacing": kind.spacing} | {key: config.get(key, defaults[key]) for key in known}
    betas = values.get("trained_betas")
    if isinstance(betas, np.ndarray | torch.Tensor):  # as diffusers' own configs may have them in memory
        values["trained_betas"] = betas.tolist()
    try:
        return check_record(_Fields, values, where, f"Mend it, or take the scheduler config that the {name} saved")
    except CalibError as error:
        raise GaqError(str(error)) from None


def _refuse(found: _Fields, where: object) -> None:
    """Raise GaqError if the network does not predict noise at whole timesteps, or is drawn as nothing here draws."""
    if found.prediction_type != "epsilon":
        raise GaqError(
            f"{where} says prediction_type {found.prediction_type!r}; only models that predict noise ('epsilon') are "
            "supported."
        )
    if found.use_flow_sigmas:
        raise GaqError(f"{where} says use_flow_sigmas, which is flow matching; networks must predict noise.")
    if found.timestep_type == "continuous":
        raise GaqError(f"{where} says timestep_type 'continuous'; networks must predict noise at whole timesteps.")
    if found.thresholding:
        raise GaqError(f"{where} asks for dynamic thresholding, which is not supported; set it to false.")
    if found.rescale_betas_zero_snr:
        raise GaqError(
            f"{where} says rescale_betas_zero_snr; schedules that end in pure noise cannot be used with a model that "
            "predicts noise."
        )
    betas = found.trained_betas
    if betas is not None and len(betas) != found.num_train_timesteps:
        raise GaqError(
            f"{where}: trained_betas has {len(betas)} values for num_train_timesteps {found.num_train_timesteps}; "
            "there must be one for each timestep."
        )


def _noise_schedule(found: _Fields) -> NoiseSchedule:
    scheduler = DDPMScheduler(
        num_train_timesteps=found.num_train_timesteps,
        beta_start=found.beta_start,
        beta_end=found.beta_end,
        beta_schedule=found.beta_schedule,
        trained_betas=found.trained_betas,
    )
    alpha_bar = scheduler.alphas_cumprod.double()  # (T,); the float32 values of diffusers, so that images agree
    variance = found.variance_type or "fixed_small"
    return NoiseSchedule(
        alpha_bar=alpha_bar,
        clip=found.clip_sample_range if found.clip_sample else None,
        # In diffusers both add the same noise.
        variance="fixed_small" if variance == "fixed_small_log" else variance,
        # With set_alpha_to_one false, DDIM's last step ends at the first timestep's alpha_bar and not at 1.
        last=1.0 if found.set_alpha_to_one else float(alpha_bar[0]),
    )


def _instead(found: _Fields, name: str, kind: SchedulerClass) -> str:
    """Return why the sampler is not what the config names, empty if it is."""
    matters = NOISE_LEVELS if kind.instead else NOISE_LEVELS | SOLVER
    values = {key: getattr(found, key) for key in matters}
    other = [f"{key} {value!r}" for key, value in values.items() if value not in matters[key] and value is not None]
    if other:
        return f"the scheduler config names {name} with {', '.join(other)}, {NOT_HERE}"
    if not kind.instead or (kind.leading and found.timestep_spacing == "leading"):
        return ""
    return f"the scheduler config names {name}, {kind.instead.format(T=found.num_train_timesteps)}"


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """Read a scheduler config without interpreting it.

    Args:
        path: The JSON file, or the folder that holds `scheduler_config.json`.

    Raises:
        GaqError: If it is missing, unreadable or no JSON object.
    """
    return read_json(path / "scheduler_config.json" if path.is_dir() else path, "scheduler config")
