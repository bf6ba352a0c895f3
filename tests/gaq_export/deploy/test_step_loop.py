"""An engine of whole steps in a loop, and asked for the noise alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import engines
from engines import EngineFile
from gaq_export.deploy import step_loop
from gaq_export.deploy.session import sampling_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import timesteps
from gaq_export.errors import GaqError

SEEDS = (4, 9)


def test_the_loop_inside_the_engine_draws_what_the_loop_outside_draws(tiny_step_engine: EngineFile) -> None:
    sampling, steps = sampling_of(tiny_step_engine), list[int]()
    visited = timesteps(sampling.sampler, sampling.schedule.num_train)
    with engines.open_engine(tiny_step_engine) as engine:
        inside = step_loop.run(engine, SEEDS, sampling, steps.append)
        outside = loop.run(step_loop.step_denoiser(engine, visited), SEEDS, sampling)
    assert steps == list(range(sampling.sampler.steps))
    torch.testing.assert_close(inside, outside, atol=1e-4, rtol=0)


def test_an_engine_predicts_noise_at_the_timesteps_of_its_steps_only(tiny_step_engine: EngineFile) -> None:
    sampling = sampling_of(tiny_step_engine)
    visited = timesteps(sampling.sampler, sampling.schedule.num_train)
    x = loop.noise(SEEDS, 0, sampling.shape)
    with engines.open_engine(tiny_step_engine) as engine:
        denoise = step_loop.step_denoiser(engine, visited)
        first, last = (denoise(x, torch.full((2,), int(t))) for t in (visited[0], visited[-1]))
        assert first.shape == x.shape
        assert not torch.allclose(first, last, atol=1e-2)
        for t in (visited[:2], visited[:1].repeat(2) + 1):
            with pytest.raises(GaqError, match=r"This engine takes the timesteps \[80, 60, 40, 20, 0\], one at a time"):
                denoise(x, t)


def test_a_value_for_all_images_is_repeated_where_the_engine_wants_a_row_each(tiny_step_engine: EngineFile) -> None:
    class Engine:  # what `as_taken` reads of one
        inputs = tuple(replace(s, shape=(None,)) if s.name == "step" else s for s in tiny_step_engine.inputs)

    x = np.zeros((3, 1, 16, 16), np.float32)
    feeds = {"x": x, "step": np.array([7]), "unused": np.zeros(1)}
    taken = step_loop.as_taken(Engine(), feeds, 3)
    assert taken.keys() == {"x", "step"}
    assert taken["step"].tolist() == [7, 7, 7]
    assert taken["x"] is x
