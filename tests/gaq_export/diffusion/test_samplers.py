import math
from collections.abc import Callable
from dataclasses import astuple, replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from gaq_export.diffusion.loop import Sampling, noise, run
from gaq_export.diffusion.samplers import table
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, linear_schedule, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.loader import wrap
from gaq_export.models.provenance import Provenance
from gaq_export.models.scheduler_config import schedule_from_scheduler_config
from tests.gaq_export.networks import Own

SHAPE = (1, 16, 16)
SEEDS = [3, 14, 15]


def sampling_on(schedule: NoiseSchedule, spec: SamplerSpec, shape: tuple[int, int, int] = SHAPE) -> Sampling:
    return Sampling(schedule=schedule, shape=shape, sampler=spec)


def _smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in network with a bounded, t-dependent answer, so that clipping acts at some steps and not at others."""
    return torch.tanh(1.5 * x + torch.sin(t.float() / 50).view(-1, 1, 1, 1))


def _diffusers_loop(
    visited: torch.Tensor, step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    x = noise(SEEDS, 0, SHAPE)
    for i, t in enumerate(visited):
        x = step(_smooth(x, t.expand(len(x))), t, x, i + 1)
    return x.clamp(-1, 1)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 70])
def test_ddim_equals_diffusers_over_a_full_loop(clip: float | None, steps: int) -> None:
    reference = DDIMScheduler(clip_sample=clip is not None)
    reference.set_timesteps(steps)
    expected = _diffusers_loop(reference.timesteps, lambda e, t, x, _: reference.step(e, t, x).prev_sample)
    images = run(_smooth, SEEDS, sampling_on(linear_schedule(clip=clip), SamplerSpec(steps=steps)))
    assert torch.allclose(images.clamp(-1, 1), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [20, 50])
def test_ddim_as_latent_diffusion_runs_it_equals_diffusers_over_a_full_loop(steps: int) -> None:
    config = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
    config |= {"set_alpha_to_one": False, "steps_offset": 1}
    reference = DDIMScheduler(**config)
    reference.set_timesteps(steps)
    expected = _diffusers_loop(reference.timesteps, lambda e, t, x, _: reference.step(e, t, x).prev_sample)
    schedule = schedule_from_scheduler_config(config | {"_class_name": "DDIMScheduler"})
    assert schedule.last == schedule.alpha_bar[0]
    images = run(_smooth, SEEDS, sampling_on(schedule, SamplerSpec(steps=steps, spacing="from-1")))
    assert torch.allclose(images.clamp(-1, 1), expected, atol=1e-5)
    noisy = run(_smooth, SEEDS, sampling_on(replace(schedule, last=1.0), SamplerSpec(steps=steps, spacing="from-1")))
    assert not torch.allclose(noisy.clamp(-1, 1), expected, atol=1e-4)
    model = wrap(Own(SHAPE[0]), shape=SHAPE, schedule=schedule)
    assert Provenance.from_json(Provenance.of(model, model.spec.sampler).to_json()).schedule.last == schedule.last


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.3), ("ddim", 1.0), ("ddim-clipped", 0.0), ("ddim-clipped", 0.3)])
def test_ddim_with_noise_equals_diffusers_over_a_full_loop(name: str, eta: float) -> None:
    reference, clipped = DDIMScheduler(), name == "ddim-clipped"
    reference.set_timesteps(20)

    def step(epsilon: torch.Tensor, t: torch.Tensor, x: torch.Tensor, stream: int) -> torch.Tensor:
        fresh = noise(SEEDS, stream, SHAPE)
        made = reference.step(epsilon, t, x, eta=eta, use_clipped_model_output=clipped, variance_noise=fresh)
        result: torch.Tensor = made.prev_sample
        return result

    expected = _diffusers_loop(reference.timesteps, step)
    images = run(_smooth, SEEDS, sampling_on(linear_schedule(), SamplerSpec(name=name, steps=20, eta=eta)))
    assert torch.allclose(images.clamp(-1, 1), expected, atol=1e-5)


def test_without_clipping_both_kinds_of_ddim_are_one() -> None:
    plain, clipped = (
        run(_smooth, SEEDS, sampling_on(linear_schedule(clip=None), SamplerSpec(name=name, steps=20)))
        for name in ("ddim", "ddim-clipped")
    )
    assert torch.allclose(plain, clipped, atol=1e-5)
    plain, clipped = (
        run(_smooth, SEEDS, sampling_on(linear_schedule(), SamplerSpec(name=name, steps=20)))
        for name in ("ddim", "ddim-clipped")
    )
    assert not torch.allclose(plain, clipped, atol=1e-2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 70])
def test_ancestral_sampling_equals_diffusers_over_a_full_loop(
    variance: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, streams = DDPMScheduler(variance_type=variance), list[int]()
    reference.set_timesteps(steps)
    drawn = "diffusers.schedulers.scheduling_ddpm.randn_tensor"  # diffusers draws its noise itself
    monkeypatch.setattr(drawn, lambda *args, **kwargs: noise(SEEDS, streams[-1], SHAPE))

    def step(epsilon: torch.Tensor, t: torch.Tensor, x: torch.Tensor, stream: int) -> torch.Tensor:
        streams.append(stream)
        result: torch.Tensor = reference.step(epsilon, t, x).prev_sample
        return result

    expected = _diffusers_loop(reference.timesteps, step)
    schedule = linear_schedule(variance=variance)
    images = run(_smooth, SEEDS, sampling_on(schedule, SamplerSpec(name="ddpm", steps=steps)))
    assert torch.allclose(images.clamp(-1, 1), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("steps", [2, 12, 50])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_dpm_solver_equals_diffusers_over_a_full_loop(steps: int, spacing: str) -> None:
    spec = SamplerSpec(name="dpmpp-2m", steps=steps, spacing=spacing)
    visited = timesteps(spec, 1000)
    reference = DPMSolverMultistepScheduler(lower_order_final=False)  # the last step is of first order all the same
    reference.set_timesteps(timesteps=visited.tolist())
    expected = _diffusers_loop(visited, lambda e, t, x, _: reference.step(e, t, x).prev_sample)
    images = run(_smooth, SEEDS, sampling_on(linear_schedule(clip=None), spec))
    assert torch.allclose(images.clamp(-1, 1), expected, atol=1e-5)


def test_dpm_solver_goes_on_where_a_timestep_is_visited_twice() -> None:
    spec = SamplerSpec(name="dpmpp-2m", steps=100, spacing="quad")
    assert len(set(timesteps(spec, 1000).tolist())) < 100
    assert all(math.isfinite(v) for row in table(linear_schedule(), spec) for v in astuple(row) if v != ())


def test_uneven_spacing_uses_the_timestep_it_really_goes_to() -> None:
    # Three quad steps over 125 timesteps visit t = 100, 25 and 0. Against a network that always knows the clean image,
    # DDIM must carry one and the same noise through every visit; a wrong alpha_bar anywhere would change it.
    schedule = linear_schedule(num_train=125, clip=None)
    clean = torch.linspace(-1, 1, 4).view(1, 1, 2, 2)
    noises: list[torch.Tensor] = []

    def oracle(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        noises.append((x - a.sqrt() * clean) / (1 - a).sqrt())
        return noises[-1]

    images = run(oracle, [0], sampling_on(schedule, SamplerSpec(steps=3, spacing="quad"), (1, 2, 2)))
    assert len(noises) == 3
    for other in noises[1:]:
        assert torch.allclose(other, noises[0], atol=1e-3)
    assert torch.allclose(images, clean, atol=1e-5)


def test_ancestral_sampling_refuses_a_variance_it_does_not_know() -> None:
    with pytest.raises(GaqError, match=r"\['fixed_large', 'fixed_small'\].*'learned'"):
        run(_smooth, SEEDS, sampling_on(linear_schedule(variance="learned"), SamplerSpec(name="ddpm", steps=2)))
