"""The calibration set: every image the same however many are asked for, and no finished group drawn twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.data import CalibrationSet
from gaq_export.diffusion.loop import noise, run
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.float_engine import GROUP
from gaq_export.quantize.trajectories import collect, image_seed

SPEC = SamplerSpec(steps=3, eta=1.0)  # eta draws noise at every step too
SHAPE = (1, 16, 16)


@pytest.fixture
def draw(tiny_model: LoadedModel) -> Callable[..., CalibrationSet]:
    """Return what collects from the tiny model."""

    def collected(images: int, spec: SamplerSpec = SPEC, fingerprint: str = "weights", **more: Any) -> CalibrationSet:
        return collect(replace(tiny_model, fingerprint=fingerprint), spec, images=images, **more)

    return collected


def by_image(data: CalibrationSet) -> torch.Tensor:
    """Return (images, steps, C, H, W)."""
    return torch.stack([data.x[data.step == s] for s in torch.unique(data.step)], 1)


class Stop(Exception):
    pass


def stop_at(call: int) -> Callable[[int, int], None]:
    def on_step(done: int, total: int) -> None:
        if done == call:
            raise Stop

    return on_step


def unwanted(done: int, total: int) -> None:
    raise AssertionError("a finished group was drawn again")


def test_an_image_is_the_same_however_many_are_asked_for(draw) -> None:
    most = by_image(draw(GROUP + 3))
    for images in (2, GROUP, GROUP + 1):
        assert torch.equal(by_image(draw(images)), most[:images])
    assert len({image.numpy().tobytes() for image in most[:, 0]}) == GROUP + 3


def test_samples_are_ordered_by_step_and_carry_what_the_network_saw(draw, tiny_model: LoadedModel) -> None:
    data = draw(2)
    assert data.step.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.t.tolist() == timesteps(SPEC, tiny_model.schedule.num_train).repeat_interleave(2).tolist()
    seeds = [image_seed(0, i) for i in range(GROUP)]
    seen: list[torch.Tensor] = []
    run(tiny_model.network, seeds, tiny_model.sampling(SPEC), lambda step, x, t: seen.append(x.clone()))
    assert torch.equal(data.x, torch.cat([x[:2] for x in seen]))
    assert torch.equal(data.x[0], noise(seeds[:1], 0, SHAPE)[0])


@pytest.mark.parametrize("call", [2, 4, 6])
def test_a_killed_collection_continues_to_the_same_bits(call: int, draw, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        draw(GROUP + 2, folder=tmp_path, on_step=stop_at(call))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == (call > 3)
    calls: list[int] = []
    data = draw(GROUP + 2, folder=tmp_path, on_step=lambda done, total: calls.append(done))
    assert calls == list(range(3 * len(kept) + 1, 7))
    assert torch.equal(data.x, draw(GROUP + 2).x)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_asking_for_more_images_draws_only_the_new_groups(draw, tmp_path: Path) -> None:
    draw(GROUP, folder=tmp_path)
    calls: list[tuple[int, int]] = []
    draw(GROUP + 1, folder=tmp_path, on_step=lambda *step: calls.append(step))
    assert calls == [(4, 6), (5, 6), (6, 6)]
    draw(2 * GROUP, folder=tmp_path, on_step=unwanted)


@pytest.mark.parametrize("change", [{"seed": 1}, {"fingerprint": "other weights"}, {"spec": SamplerSpec(steps=3)}])
def test_groups_of_another_collection_are_drawn_again(change: dict, draw, tmp_path: Path) -> None:
    draw(2, folder=tmp_path)
    calls: list[int] = []
    data = draw(2, folder=tmp_path, on_step=lambda done, total: calls.append(done), **change)
    assert calls == [1, 2, 3]
    assert torch.equal(data.x, draw(2, **change).x)


def test_a_damaged_group_is_drawn_again(draw, tmp_path: Path) -> None:
    data = draw(2, folder=tmp_path)
    file = tmp_path / "0000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(draw(2, folder=tmp_path).x, data.x)


def test_calibration_seeds_are_fixed_and_far_from_the_seeds_that_users_draw_with() -> None:
    seeds = [image_seed(0, i) for i in range(1000)]
    assert seeds[0] == 6059950962268590226
    assert len(set(seeds) | {image_seed(1, i) for i in range(1000)}) == 2000
    assert min(seeds) > 10**12
    assert max(seeds) < 2**63


@pytest.mark.parametrize("images", [-1, 0, 1])
def test_fewer_than_two_images_are_refused(images: int, draw) -> None:
    with pytest.raises(GaqError, match=rf"Found {images} calibration images; at least 2 are needed"):
        draw(images)
