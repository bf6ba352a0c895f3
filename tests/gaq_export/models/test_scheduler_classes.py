"""What becomes of every scheduler class of diffusers, and whether the pictures are those that it draws."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gaq_export.diffusion.loop import Sampling, noise, run
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.scheduler_classes import CLASSES, NOT_HERE
from gaq_export.models.scheduler_config import SchedulerReading, read_scheduler

SHAPE = (1, 8, 8)
SEEDS = [3, 14]
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_ALPHA_BAR = diffusers.DDPMScheduler(**LATENT).alphas_cumprod
EXACT = [name for name, kind in CLASSES.items() if kind.sampler and not kind.instead]
REPLACED = [name for name, kind in CLASSES.items() if kind.instead]
REFUSED = [name for name, kind in CLASSES.items() if kind.refused]


def _network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The noise in images of standard deviation 0.5, and something that is not linear, so that each step counts."""
    a = _ALPHA_BAR[t.long()].view(-1, 1, 1, 1)
    return (1 - a).sqrt() * x / (0.25 * a + 1 - a) + 0.05 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 50)


def _diffusers(scheduler: Any, steps: int, **options: float) -> torch.Tensor:
    """Draw with a scheduler of diffusers, as its pipelines do, and with our noise."""
    scheduler.set_timesteps(steps)
    x = noise(SEEDS, 0, SHAPE) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        if options:
            options["variance_noise"] = noise(SEEDS, step + 1, SHAPE)  # type: ignore[assignment]
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(_network(scaled, t.expand(len(x))), t, x, **options).prev_sample
    return x


def _ours(reading: SchedulerReading, sampler: SamplerSpec) -> torch.Tensor:
    # Without clipping there, the loop returns what it ends with.
    return run(_network, SEEDS, Sampling(schedule=reading.schedule, shape=SHAPE, sampler=sampler))


def _saved(scheduler: Any, folder: Path) -> SchedulerReading:
    scheduler.save_pretrained(folder)
    return read_scheduler(folder)


def test_every_scheduler_of_diffusers_is_decided_about() -> None:
    assert {name for name in dir(diffusers) if name.endswith("Scheduler")} - CLASSES.keys() == set()
    assert all(bool(kind.sampler) != bool(kind.refused) for kind in CLASSES.values())


# Fields of a class that change its pictures, beside the spacing and offset that all have.
FIELDS: dict[str, list[dict[str, object]]] = {
    "DDIM": [
        {"set_alpha_to_one": last, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
        for last in (True, False)
        for clip in (None, 1.0, 2.0)
    ],
    "DPMS": [{}],
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name in EXACT for fields in FIELDS[name[:4]]])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_model_is_drawn_as_its_own_scheduler_draws_it(
    name: str, fields: dict[str, object], spacing: str, offset: int, tmp_path: Path
) -> None:
    reference = getattr(diffusers, name)(**LATENT, **fields, timestep_spacing=spacing, steps_offset=offset)
    reading = _saved(reference, tmp_path)
    assert reading.instead == ""
    for steps in (4, 7, 30):  # 7 and 30 do not divide 1000
        expected = _diffusers(reference, steps)
        expected = expected if reading.schedule.clip is None else expected.clamp(-1, 1)
        sampler = SamplerSpec(name=reading.sampler.name, spacing=reading.sampler.spacing, steps=steps)
        assert (_ours(reading, sampler) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_follows_the_spacing_too(spacing: str, offset: int, eta: float, tmp_path: Path) -> None:
    reference = diffusers.DDIMScheduler(
        **LATENT, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=False, clip_sample=False
    )
    reading = _saved(reference, tmp_path)
    sampler = SamplerSpec(spacing=reading.sampler.spacing, steps=7, eta=eta)
    assert (_ours(reading, sampler) - _diffusers(reference, 7, eta=eta)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log"])
@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_sampling_is_that_of_the_scheduler_if_it_is_asked_for(
    name: str, spacing: str, offset: int, variance: str, clip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = getattr(diffusers, name)(
        **LATENT, timestep_spacing=spacing, steps_offset=offset, variance_type=variance, clip_sample=clip
    )
    reading = _saved(reference, tmp_path)
    streams = iter(range(1, 100))
    drawn = f"diffusers.schedulers.{type(reference).__module__.rpartition('.')[2]}.randn_tensor"
    monkeypatch.setattr(drawn, lambda *args, **kwargs: noise(SEEDS, next(streams), SHAPE))
    expected = _diffusers(reference, 7)
    expected = expected.clamp(-1, 1) if clip else expected
    sampler = SamplerSpec(name="ddpm", spacing=reading.sampler.spacing, steps=7)
    assert (_ours(reading, sampler) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", REPLACED)
def test_another_sampler_than_the_scheduler_asks_for_is_named(name: str) -> None:
    reading = read_scheduler({"_class_name": name})
    assert reading.sampler.name == CLASSES[name].sampler
    assert reading.instead.startswith(f"the scheduler config names {name}, which")


OTHERWISE = {
    "EulerDiscreteScheduler": {"use_karras_sigmas": True, "interpolation_type": "log_linear"},
    "UniPCMultistepScheduler": {"use_exponential_sigmas": True},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    "LMSDiscreteScheduler": {"use_beta_sigmas": True},
    "PNDMScheduler": {},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_settings_that_have_no_effect_here_are_named(name: str) -> None:
    reading = read_scheduler({"_class_name": name} | OTHERWISE[name])
    listed = ", ".join(f"{key} {value!r}" for key, value in OTHERWISE[name].items())
    settings = f" with {listed}" if listed else ""
    assert reading.instead == f"the scheduler config names {name}{settings}, {NOT_HERE}"


def test_a_multistep_solver_in_another_form_is_not_silently_ours() -> None:
    for field, value in {"solver_order": 1, "solver_type": "heun", "final_sigmas_type": "sigma_min"}.items():
        assert f"{field} {value!r}" in read_scheduler({"_class_name": EXACT[-1], field: value}).instead


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler_at_whole_timesteps_is_ddim(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = getattr(diffusers, name)(**LATENT, timestep_spacing="leading", steps_offset=1)
    reading = _saved(reference, tmp_path)
    assert reading.instead == ""
    streams = iter(range(1, 100))
    drawn = f"{getattr(diffusers, name).__module__}.randn_tensor"
    monkeypatch.setattr(drawn, lambda *args, **kwargs: noise(SEEDS, next(streams), SHAPE))
    assert (_ours(reading, replace(reading.sampler, steps=10)) - _diffusers(reference, 10)).abs().max() <= 1e-5
    for further in ({"timestep_spacing": "trailing"}, {"use_karras_sigmas": name == "EulerDiscreteScheduler"}):
        assert bool(read_scheduler(reference.config | further).instead) == any(further.values())


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_do_not_predict_noise_at_whole_timesteps_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "prediction_type": "epsilon"}))
    with pytest.raises(GaqError) as caught:
        read_scheduler(tmp_path)
    line = str(caught.value)
    assert f"{name} {CLASSES[name].refused}" in line
    assert "must predict noise at whole timesteps" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", [5, None, [], {}, "", "Foo", "FlaxDDIMScheduler", "UNet2DModel", "x" * 10_000])
def test_a_class_that_diffusers_does_not_have_is_refused(name: object) -> None:
    with pytest.raises(GaqError, match="_class_name") as caught:
        read_scheduler({"_class_name": name})
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("field", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
def test_noise_prediction_is_not_assumed_of_solvers_that_can_do_otherwise(field: dict[str, object]) -> None:
    with pytest.raises(GaqError, match=r"flow"):
        read_scheduler({"_class_name": "UniPCMultistepScheduler"} | field)
