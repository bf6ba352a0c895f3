from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import load_model, wrap
from gaq_export.models.registry import MODELS


def test_the_bundled_model_loads_by_name_alone() -> None:
    model = load_model("ddpm-mnist")
    assert (str(model.source), model.random_weights, model.shape) == ("bundled", False, (1, 32, 32))
    assert model.spec.sampler == SamplerSpec(name="ddim", steps=50, spacing="uniform")
    assert model.schedule.num_train == 1000
    assert not model.module.training
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert load_model("ddpm-mnist", model.source).fingerprint == model.fingerprint


def test_the_bundled_model_predicts_the_noise_in_a_noisy_stroke() -> None:
    model = load_model("ddpm-mnist")
    clean = torch.full((1, 1, 32, 32), -1.0)
    clean[..., 6:26, 15:18] = 1.0
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    a = model.schedule.alpha_bar[200].float()
    with torch.no_grad():
        predicted = model.module(a.sqrt() * clean + (1 - a).sqrt() * noise, torch.tensor([200])).sample
    assert (predicted - noise).square().mean() < 0.05


def test_a_folder_decides_structure_name_and_schedule(tiny_folder: Path, tiny_unet: UNet2DModel) -> None:
    model = load_model(None, tiny_folder)
    assert (model.spec.name, str(model.source), model.shape) == ("tiny", str(tiny_folder.resolve()), (1, 16, 16))
    assert model.schedule.num_train == 100
    assert model.spec.sampler == SamplerSpec()
    for name, value in tiny_unet.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value)
    assert load_model(model.spec.name, model.source).fingerprint == model.fingerprint


def test_a_folder_under_a_known_name_borrows_its_sampler_and_not_its_structure(tiny_folder: Path) -> None:
    model = load_model("ddpm-cifar10", tiny_folder)
    assert model.spec.sampler == MODELS["ddpm-cifar10"].sampler
    assert model.shape == (1, 16, 16)
    (tiny_folder / "scheduler_config.json").unlink()
    assert load_model("ddpm-cifar10", tiny_folder).schedule.num_train == 1000


def test_random_weights_are_seeded_and_marked_and_leave_the_random_stream_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_model("ddpm-mnist", weights) for weights in ("random", "random:0", "random:7"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.random_weights
    assert str(first.source) == "random"
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert load_model("ddpm-mnist", other.source).fingerprint == other.fingerprint


def test_a_module_of_the_callers_own_becomes_a_model_as_it_is(tiny_schedule: NoiseSchedule) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.conv(x))

    module = Linear()
    model = wrap(module, shape=(3, 8, 12), schedule=tiny_schedule)
    assert model.network is module
    assert not module.training
    assert (model.shape, str(model.source), model.spec.sampler) == ((3, 8, 12), "module", SamplerSpec())
    assert model.fingerprint == fingerprint(module)


def test_the_environment_variable_comes_before_the_bundled_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAQ_EXPORT_MODELS", str(tiny_folder.parent))
    assert str(load_model("ddpm-mnist").source) == "bundled"
    tiny_folder.rename(tiny_folder.with_name("ddpm-mnist"))
    model = load_model("ddpm-mnist")
    assert (str(model.source), model.shape) == (str((tiny_folder.parent / "ddpm-mnist").resolve()), (1, 16, 16))
    monkeypatch.setenv("GAQ_EXPORT_MODELS", str(tiny_folder.parent / "gone"))
    with pytest.raises(GaqError, match=r"GAQ_EXPORT_MODELS names .*gone, which is not a folder"):
        load_model("ddpm-mnist")


def test_an_unknown_model_is_answered_with_the_list_and_the_nearest_name() -> None:
    with pytest.raises(GaqError, match=r"Unknown model 'ddpm-cifar'\. Did you mean 'ddpm-cifar10'\?.*'ddpm-bedroom'"):
        load_model("ddpm-cifar")
    with pytest.raises(GaqError, match=r"No model was named.*'ddpm-mnist'"):
        load_model()
    with pytest.raises(GaqError, match=r"'ddpm-church' are not bundled. Bundled models: \['ddpm-mnist', 'ddpm-m"):
        load_model("ddpm-church", "bundled")
    with pytest.raises(GaqError, match="random:x must be a whole number"):
        load_model("ddpm-mnist", "random:x")
