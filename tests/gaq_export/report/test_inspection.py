"""What a finished run is measured with: fresh trajectories, and how far the grids of each layer reach."""

import dataclasses
from pathlib import Path

import pytest
import torch

from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.sqnr import sqnr_db
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.trajectories import image_seed
from gaq_export.report import inspection


def few_steps(plan: QuantPlan, about: dict) -> QuantPlan:
    """Return the plan as if made for a sampler of five noisy steps, its model and schedule as in `about`."""
    return dataclasses.replace(plan, provenance={**about, "sampler": SamplerSpec(steps=5, eta=1.0).to_json()})


def ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def plan(tiny_run: Path) -> QuantPlan:
    return load_plan(tiny_run / "plan.safetensors")


def test_no_fresh_image_has_a_seed_that_calibration_used() -> None:
    fresh = {image_seed(0, i, "inspection") for i in range(64)}
    assert len(fresh) == 64
    assert fresh & {image_seed(0, i) for i in range(64)} == set()


def test_noise_is_compared_on_the_float_models_own_trajectories(tiny_model, plan: QuantPlan) -> None:
    progress, plan = [], few_steps(plan, plan.provenance)
    found = noise_sqnr.of_plan(tiny_model, plan, 5, lambda *step: progress.append(step))
    spec = SamplerSpec.from_json(plan.provenance["sampler"])
    networks = [fake_quantized(tiny_model.network, plan, activations=rounded) for rounded in (False, True)]
    seen = []
    loop.run(
        tiny_model.network,
        [image_seed(plan.config.seed, 4, "inspection")],
        tiny_model.sampling(spec),
        lambda step, x, t: seen.append((x.clone(), t)),
    )
    with torch.no_grad():
        expected = [[sqnr_db(tiny_model.network(x, t), net(x, t)) for x, t in seen] for net in networks]
    assert found.weights[:, 4].tolist() == pytest.approx(expected[0], rel=1e-3)
    assert found.both[:, 4].tolist() == pytest.approx(expected[1], rel=1e-3)
    assert torch.equal(found.t, timesteps(spec, 100))
    assert found.weights.shape == found.both.shape == (spec.steps, 5)
    assert [done for _, done, _ in progress] == list(range(1, 2 * spec.steps + 1))  # groups of four images
    assert {total for *_, total in progress} == {2 * spec.steps}


def test_more_bits_are_closer_to_float(tiny_model, tiny_plan, plan: QuantPlan) -> None:
    def decibels(wbits: int, abits: int) -> torch.Tensor:
        return noise_sqnr.of_plan(
            tiny_model, few_steps(tiny_plan(wbits, abits), plan.provenance), 1, ignore
        ).both.median()

    assert decibels(8, 8) > decibels(2, 8) + 10


def test_ranges_say_what_each_grid_reaches(tiny_model, plan: QuantPlan) -> None:
    found = inspection.layer_ranges(tiny_model, plan)
    assert [layer.name for layer in found] == list(plan.layers)
    for layer in found:
        q, weight = plan.layers[layer.name], tiny_model.network.get_submodule(layer.name).weight.detach()
        shares = [float(7 * s / w.abs().max()) for s, w in zip(q.weight_scale, weight, strict=True)]
        assert layer.covered == pytest.approx((min(shares), float(torch.tensor(shares).median()), max(shares)))
        assert 0.2 < layer.covered[0] <= layer.covered[1] <= layer.covered[2] <= 1.0001
        assert layer.input_reach == pytest.approx((127 - min(q.input.zero)) * q.input.scale)
        assert layer.channels == len(weight)
