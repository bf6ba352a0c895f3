import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from gaq_export.diffusion import samplers
from gaq_export.diffusion.schedule import (
    SAMPLER_NAMES,
    SPACINGS,
    NoiseSchedule,
    SamplerSpec,
    linear_schedule,
    timesteps,
)
from gaq_export.errors import GaqError


def test_a_linear_schedule_is_the_running_product_of_one_minus_beta() -> None:
    schedule = linear_schedule(num_train=4, beta_start=0.1, beta_end=0.4)
    expected = torch.tensor([0.9, 0.72, 0.504, 0.3024], dtype=torch.float64)  # 0.9, *0.8, *0.7, *0.6
    assert schedule.alpha_bar.dtype == torch.float64
    assert torch.allclose(schedule.alpha_bar, expected, atol=1e-7)
    assert schedule.num_train == 4


def test_a_noise_schedule_checks_its_fields() -> None:
    rising = torch.tensor([0.5, 0.9], dtype=torch.float64)
    with pytest.raises(GaqError, match="must fall steadily"):
        NoiseSchedule(alpha_bar=rising, clip=None, variance="fixed_small")
    with pytest.raises(GaqError, match=r"not torch.float32 of shape \(2,\)"):
        NoiseSchedule(alpha_bar=rising.flip(0).float(), clip=None, variance="fixed_small")
    with pytest.raises(GaqError, match="not -1"):
        NoiseSchedule(alpha_bar=rising.flip(0), clip=-1.0, variance="fixed_small")


@pytest.mark.parametrize(("steps", "num_train"), [(1, 1000), (7, 1000), (50, 1000), (100, 1000), (100, 100)])
def test_uniform_spacing_is_the_leading_spacing_of_diffusers(steps: int, num_train: int) -> None:
    reference = DDIMScheduler(num_train_timesteps=num_train)
    reference.set_timesteps(steps)
    assert timesteps(SamplerSpec(steps=steps), num_train).tolist() == reference.timesteps.tolist()


def test_quad_spacing_agrees_with_a_case_worked_by_hand() -> None:
    # sqrt(0.8 * 125) = 10, so the roots are 0, 2.5, 5, 7.5, 10 and the squares 0, 6.25, 25, 56.25, 100.
    assert timesteps(SamplerSpec(steps=5, spacing="quad"), 125).tolist() == [100, 56, 25, 6, 0]


def test_beta_spacing_is_symmetric_and_dense_at_both_ends() -> None:
    visited = timesteps(SamplerSpec(steps=20, spacing="beta"), 1000).flip(0)
    assert visited[0] == 0
    assert visited[10] == 500
    assert (visited[1:] + visited[1:].flip(0) - 1000).abs().max() <= 1
    strides = visited.diff()
    assert (strides > 0).all()
    assert strides[0] < strides[5] < strides[9]
    assert strides[-1] < strides[-5]
    inner = ((visited > 100) & (visited < 900)).sum()
    uniform = timesteps(SamplerSpec(steps=20), 1000)
    assert inner < ((uniform > 100) & (uniform < 900)).sum()


def test_quad_spacing_keeps_the_repeats_of_the_published_protocol() -> None:
    published = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 100) ** 2]
    visited = timesteps(SamplerSpec(steps=100, spacing="quad"), 1000)
    assert visited.tolist() == published[::-1]
    assert visited.tolist()[-5:] == [1, 0, 0, 0, 0]
    assert visited.dtype == torch.int64


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(GaqError, match=r"101 sampling steps are more than the 100 timesteps .* --steps 100 or fewer"):
        timesteps(SamplerSpec(steps=101), 100)
    with pytest.raises(GaqError, match="choose --steps 99 or fewer"):
        timesteps(SamplerSpec(name="dpmpp-2m", steps=100), 100)
    with pytest.raises(GaqError, match=r"100 sampling steps of from-1 spacing would begin at timestep 100, .* is 99"):
        timesteps(SamplerSpec(steps=100, spacing="from-1"), 100)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_spacings_visit_what_diffusers_visits(spacing: str, offset: int) -> None:
    name = {"leading": f"from-{offset}" if offset else "uniform"}.get(spacing, spacing)
    ddim = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    dpm = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 150):
        ddim.set_timesteps(steps)
        # Its range has one entry too many where the stride is rounded down: timestep -1, after the end.
        assert timesteps(SamplerSpec(steps=steps, spacing=name), 1000).tolist() == ddim.timesteps.tolist()[:steps]
        dpm.set_timesteps(steps)
        spec = SamplerSpec(name="dpmpp-2m", steps=steps, spacing=name)
        assert timesteps(spec, 1000).tolist() == dpm.timesteps.tolist()[:steps]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "plms"}, r"Unknown sampler 'plms'. Choose one of \['ddim', 'ddim-clipped', 'ddpm', 'dpmpp-2m'\]"),
        ({"spacing": "cubic"}, r"Unknown spacing 'cubic'. Choose one of \['beta', 'from-1', .* 'uniform'\]"),
        ({"spacing": "from-0"}, "Unknown spacing 'from-0'"),
        ({"spacing": "from-1x"}, "Unknown spacing 'from-1x'"),
        ({"spacing": ["uniform"]}, r"Unknown spacing \['uniform'\]"),
        ({"steps": 0}, "from 1 up, not 0"),
        ({"steps": 2.5}, "from 1 up, not 2.5"),
        ({"eta": 1.5}, "between 0 and 1, not 1.5"),
        ({"eta": float("nan")}, "between 0 and 1, not nan"),
        ({"name": "ddpm", "eta": 0.5}, "the 'ddpm' sampler takes none"),
        ({"step": 5}, r"Unknown sampler fields \['step'\]"),
    ],
)
def test_a_sampler_spec_refuses_fields_outside_their_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(GaqError, match=message):
        SamplerSpec.from_json(fields)


def test_a_sampler_spec_survives_json() -> None:
    spec = SamplerSpec(name="ddim", steps=20, spacing="quad", eta=0.3)
    assert SamplerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert SamplerSpec.from_json({}) == SamplerSpec()


def test_every_name_in_the_tables_works() -> None:
    assert tuple(samplers.SAMPLERS) == SAMPLER_NAMES
    for name in SAMPLER_NAMES:
        for spacing in SPACINGS:
            assert len(timesteps(SamplerSpec(name=name, spacing=spacing, steps=3), 10)) == 3
