import pytest
import torch
from diffusers import UNet2DModel

from gaq_export.diffusion.loop import Sampling, finish, run
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, linear_schedule, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.architectures import as_denoiser

SHAPE = (1, 16, 16)
SEEDS = [3, 14, 15]


def sampling_on(schedule: NoiseSchedule, spec: SamplerSpec, shape: tuple[int, int, int] = SHAPE) -> Sampling:
    return Sampling(schedule=schedule, shape=shape, sampler=spec)


def _smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in network with a bounded, t-dependent answer, so that clipping acts at some steps and not at others."""
    return torch.tanh(1.5 * x + torch.sin(t.float() / 50).view(-1, 1, 1, 1))


def test_an_image_depends_on_its_seed_and_not_on_its_batch(
    tiny_unet: UNet2DModel, tiny_schedule: NoiseSchedule
) -> None:
    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # one by one: the kernels depend on the batch
        return torch.cat([as_denoiser(tiny_unet)(*one) for one in zip(x.split(1), t.split(1), strict=True)])

    for spec in (SamplerSpec(steps=4), SamplerSpec(steps=4, eta=1.0), SamplerSpec(name="ddpm", steps=4)):
        together = run(denoiser, [7, 8, 9], sampling_on(tiny_schedule, spec))
        alone = run(denoiser, [9], sampling_on(tiny_schedule, spec))
        assert torch.equal(together[2:], alone)
        assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_sampling_leaves_the_global_random_stream_alone(tiny_schedule: NoiseSchedule) -> None:
    before = torch.random.get_rng_state()
    run(_smooth, SEEDS, sampling_on(tiny_schedule, SamplerSpec(name="ddpm", steps=3)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_on_step_sees_what_the_network_sees_noisiest_first(tiny_schedule: NoiseSchedule) -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    called: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        called.append((x.clone(), t))
        return _smooth(x, t)

    spec = SamplerSpec(steps=5)
    run(network, SEEDS, sampling_on(tiny_schedule, spec), lambda step, x, t: seen.append((step, x, t)))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [int(t[0]) for _, _, t in seen] == timesteps(spec, 100).tolist() == [80, 60, 40, 20, 0]
    for (_, x, t), (x_called, t_called) in zip(seen, called, strict=True):
        assert torch.equal(x, x_called)
        assert torch.equal(t, t_called)
        assert (t.dtype, tuple(t.shape), x.dtype) == (torch.int64, (3,), torch.float32)


def test_images_are_within_range_even_when_nothing_was_clipped_but_latents_stay_as_they_are() -> None:
    latents = run(lambda x, t: -x, SEEDS, sampling_on(linear_schedule(clip=None), SamplerSpec(steps=5)))
    assert latents.abs().max() > 1
    assert torch.equal(finish(SEEDS, latents, sampling_on(linear_schedule(), SamplerSpec())), latents.clamp(-1, 1))


def test_a_network_of_the_wrong_shape_is_refused(tiny_schedule: NoiseSchedule) -> None:
    with pytest.raises(GaqError, match=r"shape \(3, 2, 16, 16\) for images of \(3, 1, 16, 16\)"):
        run(lambda x, t: x.repeat(1, 2, 1, 1), SEEDS, sampling_on(tiny_schedule, SamplerSpec(steps=2)))


def test_images_that_are_not_finite_are_refused_by_seed(tiny_schedule: NoiseSchedule) -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, torch.nan, x)

    with pytest.raises(GaqError, match=r"not finite .* for seeds \[14\]"):
        run(network, SEEDS, sampling_on(tiny_schedule, SamplerSpec(steps=2)))


def test_a_loop_without_seeds_is_refused(tiny_schedule: NoiseSchedule) -> None:
    with pytest.raises(GaqError, match="No seeds"):
        run(_smooth, [], sampling_on(tiny_schedule, SamplerSpec()))
