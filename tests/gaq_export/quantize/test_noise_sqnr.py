"""The predicted noise of two denoisers, compared where the leader's trajectory passes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.sqnr import sqnr_db
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.float_engine import GROUP
from gaq_export.quantize.trajectories import image_seed

SPEC = SamplerSpec(steps=4)


@pytest.fixture(scope="module")
def plan(tiny_run: Path) -> QuantPlan:
    return load_plan(tiny_run / "plan.safetensors")


def test_a_recorded_trajectory_is_what_the_sampler_shows_its_network(tiny_model: LoadedModel) -> None:
    model = tiny_model
    trajectory = noise_sqnr.record(model.network, range(3), model.sampling(SPEC))
    seen: list[tuple[Tensor, Tensor]] = []
    loop.run(model.network, range(3), model.sampling(SPEC), lambda _, x, t: seen.append((x, t)))
    assert trajectory.x.shape == trajectory.epsilon.shape == (4, 3, *model.shape)
    assert all(torch.equal(a, x) for a, (x, _) in zip(trajectory.x, seen, strict=True))
    assert all(torch.equal(a, t) for a, (_, t) in zip(trajectory.t, seen, strict=True))
    with torch.no_grad():
        assert torch.equal(trajectory.epsilon[2], model.network(*seen[2]))


def test_squared_errors_are_summed_over_all_images(tiny_model: LoadedModel) -> None:
    model = tiny_model
    trajectory = noise_sqnr.record(model.network, range(2), model.sampling(SPEC))
    power = trajectory.epsilon.double().square().flatten(1).sum(1).tolist()
    errors = noise_sqnr.squared_errors(trajectory, lambda x, t: 1.5 * model.network(x, t))
    assert errors == pytest.approx([0.25 * value for value in power], rel=1e-6)


def test_a_correction_is_applied_before_the_comparison(tiny_model: LoadedModel) -> None:
    model = tiny_model
    trajectory = noise_sqnr.record(model.network, range(2), model.sampling(SPEC))
    correction = Correction(
        rule="ptqd",
        gain=((0.5,),) * 4,
        bias=((3.0,),) * 4,
        shift=((0.0,),) * 4,
        variance=(0.0,) * 4,
        explained=(0.0,) * 4,
    )
    errors = noise_sqnr.squared_errors(trajectory, lambda x, t: 2 * model.network(x, t) + 3, correction)
    assert max(errors) < 1e-6


def test_steps_are_compared_where_either_network_comes_by(tiny_model: LoadedModel) -> None:
    visited = []

    def worse(x: Tensor, t: Tensor, /) -> Tensor:
        visited.append(x)
        return 1.1 * tiny_model.network(x, t)

    model = tiny_model
    with torch.no_grad():
        rows = noise_sqnr.along_both(worse, model.network, range(2), model.sampling(SPEC))
    assert rows.keys() == {"float trajectory", "quantized trajectory"}
    assert all(row == pytest.approx([20.0] * 4, abs=1e-3) for row in rows.values())
    drawn: list[Tensor] = []
    for network in (model.network, lambda x, t: 1.1 * model.network(x, t)):
        loop.run(network, range(2), model.sampling(SPEC), lambda s, x, t: drawn.append(x))
    assert all(torch.equal(a, b) for a, b in zip(visited, drawn, strict=True))


def test_a_plan_is_compared_image_by_image_on_fresh_trajectories(tiny_model: LoadedModel, plan: QuantPlan) -> None:
    progress: list[tuple[str, int, int]] = []
    measured = noise_sqnr.of_plan(tiny_model, plan, 1, lambda *step: progress.append(step))
    spec = SamplerSpec.from_json(plan.provenance["sampler"])
    seeds = [image_seed(plan.config.seed, 0, "inspection")]
    trajectory = noise_sqnr.record(tiny_model.network, seeds, tiny_model.sampling(spec))
    with torch.no_grad():
        x, t, epsilon = (part[7] for part in (trajectory.x, trajectory.t, trajectory.epsilon))
        expected = sqnr_db(epsilon[0], fake_quantized(tiny_model.network, plan)(x, t)[0])
    assert float(measured.both[7, 0]) == pytest.approx(expected, rel=1e-6)
    assert measured.weights.shape == measured.both.shape == (spec.steps, 1)
    assert [done for _, done, _ in progress] == list(range(1, spec.steps + 1))
    assert GROUP > 1  # so that one image is one group
