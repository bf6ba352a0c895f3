"""Read the `scheduler_config.json` of a diffusers folder as a `NoiseSchedule`.

In: the config. Out: the noise schedule that the network was trained with. diffusers' `DDPMScheduler` computes the
numbers. Every beta schedule that it knows is therefore supported, and images agree with its pipelines.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler

from gaq_export.diffusion.schedule import NoiseSchedule
from gaq_export.errors import GaqError
from gaq_export.models.json_file import read_json


def schedule_from_scheduler_config(source: str | Path | Mapping[str, Any]) -> NoiseSchedule:
    """Read a noise schedule from a diffusers scheduler config.

    Args:
        source: The config as a mapping, its JSON file, or the folder that holds `scheduler_config.json`.

    Raises:
        GaqError: If the file is missing or unreadable, or the model predicts anything but noise.
    """
    config = dict(source) if isinstance(source, Mapping) else read_scheduler_config(Path(source))
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise GaqError(
            f"The scheduler config says prediction_type {prediction!r}; only models that predict noise ('epsilon') "
            "are supported."
        )
    if config.get("thresholding"):
        raise GaqError("The scheduler config asks for dynamic thresholding, which is not supported; set it to false.")
    fields = _fields_of(config.get("_class_name"))
    if "clip_sample" not in fields:  # a scheduler that never clips, unlike `DDPMScheduler` by default
        config["clip_sample"] = False
    # With set_alpha_to_one false, the sampler's last step ends at the first timestep's alpha_bar and not at 1.
    ends_noisy = "set_alpha_to_one" in fields and not config.get("set_alpha_to_one", fields["set_alpha_to_one"].default)
    # Other schedulers have fields that it does not take; those that say how the noise grows have the same names.
    try:
        scheduler = DDPMScheduler(**{k: v for k, v in config.items() if k in _fields_of(None)})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise GaqError(f"diffusers cannot make a noise schedule from this scheduler config: {error}") from error
    clip = float(scheduler.config["clip_sample_range"]) if scheduler.config["clip_sample"] else None
    alpha_bar = scheduler.alphas_cumprod.double()  # (T,); the float32 values of diffusers, so that images agree
    return NoiseSchedule(
        alpha_bar=alpha_bar,
        clip=clip,
        variance=str(scheduler.config["variance_type"]),
        last=float(alpha_bar[0]) if ends_noisy else 1.0,
    )


def _fields_of(scheduler: str | None) -> Mapping[str, inspect.Parameter]:
    """Return the fields of one of diffusers' schedulers; those of `DDPMScheduler` for a class it does not have."""
    kind = getattr(diffusers, scheduler or "", DDPMScheduler)
    return inspect.signature(kind.__init__).parameters


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """Read a scheduler config without interpreting it.

    Args:
        path: The JSON file, or the folder that holds `scheduler_config.json`.

    Raises:
        GaqError: If it is missing, unreadable or no JSON object.
    """
    return read_json(path / "scheduler_config.json" if path.is_dir() else path, "scheduler config")
