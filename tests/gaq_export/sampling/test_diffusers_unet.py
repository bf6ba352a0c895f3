"""The pipelines are diffusers' own, with the engine where they expect a U-Net."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor

import engines
from engines import EngineConfig, EngineFile
from gaq_export import EngineUNet, images
from gaq_export.deploy import build, session
from gaq_export.deploy.record import EngineRecord, GraphKind, record_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import Conditioning, class_conditioning
from gaq_export.diffusion.denoiser import engine_denoiser
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule, timesteps
from gaq_export.errors import GaqError
from gaq_export.graph.files import save_onnx
from gaq_export.models.loader import LoadedModel, wrap
from gaq_export.models.provenance import Provenance
from gaq_export.models.scheduler_config import schedule_from_scheduler_config
from gaq_export.sampling.diffusers_unet import TEXT

# Two loops add in another order; where a value lies on a rounding edge, that moves it by a step of its grid.
SAME_DB = 40.0
TRAINED = {"num_train_timesteps": 100, "beta_end": 0.2}  # as `write_tiny_folder` says
LATENT = {**TRAINED, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}  # as Stable Diffusion's
SMALL = EngineConfig(backend="openvino", threads=1, batch=(1, 2, 2))


def _drawn(pipe: DDIMPipeline, **options: object) -> Tensor:
    """Return a pipeline's pictures in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    found = pipe(generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    return torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1  # (N, H, W, C) -> (N, C, H, W)


@pytest.fixture
def as_pipelines_draw_it(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes our samplers take their noise, in order, from the generator that `_drawn` gives a pipeline."""

    def start() -> None:
        generator = torch.Generator().manual_seed(0)

        def noise(seeds: Sequence[int], stream: int, shape: tuple[int, int, int]) -> Tensor:
            return torch.randn((len(seeds), *shape), generator=generator)

        monkeypatch.setattr(loop, "noise", noise)

    return start


def _by_us(opened: EngineUNet, spec: SamplerSpec, num: int) -> Tensor:
    """Return pictures in [-1, 1] by our own loop, with the same open engine."""
    return loop.run(opened.predict_noise, range(num), session.sampling_of(opened.file, spec))


@pytest.fixture(scope="module")
def unet(tiny_engine: EngineFile) -> Iterator[EngineUNet]:
    with EngineUNet(tiny_engine.path) as opened:
        yield opened


def _psnr(found: Tensor, expected: Tensor) -> float:
    return float(images.psnr(found, expected).min())


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_ddim_pipeline_draws_what_our_sampler_does(
    unet: EngineUNet, as_pipelines_draw_it: Callable[[], None], eta: float
) -> None:
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(**TRAINED))
    found = _drawn(pipe, batch_size=2, num_inference_steps=10, eta=eta)
    as_pipelines_draw_it()
    assert _psnr(found, _by_us(unet, SamplerSpec(steps=10, eta=eta), 2)) > SAME_DB


def test_a_ddpm_pipeline_draws_what_our_sampler_does(
    unet: EngineUNet, as_pipelines_draw_it: Callable[[], None]
) -> None:
    pipe = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**TRAINED))
    found = _drawn(pipe, batch_size=2, num_inference_steps=10)
    as_pipelines_draw_it()
    assert _psnr(found, _by_us(unet, SamplerSpec(name="ddpm", steps=10), 2)) > SAME_DB


def test_an_engine_of_steps_serves_a_pipeline_of_the_same_steps_and_no_other(
    tiny_step_engine: EngineFile, as_pipelines_draw_it: Callable[[], None]
) -> None:
    spec = record_of(tiny_step_engine).provenance.sampler
    with EngineUNet(tiny_step_engine.path) as unet:
        pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(**TRAINED))
        found = _drawn(pipe, batch_size=2, num_inference_steps=spec.steps, eta=spec.eta)
        with pytest.raises(GaqError, match=r"takes the timesteps \[80, 60, 40, 20, 0\], one at a time; found \[75"):
            _drawn(pipe, batch_size=1, num_inference_steps=4)
        as_pipelines_draw_it()
        assert _psnr(found, _by_us(unet, spec, 2)) > SAME_DB


def test_a_published_pipeline_takes_the_engine_in_one_line(home: Path, unet: EngineUNet, tmp_path: Path) -> None:
    whole = DDPMPipeline(unet=UNet2DModel.from_pretrained(home), scheduler=DDPMScheduler(**TRAINED))
    whole.save_pretrained(tmp_path / "pipe")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipe", unet=unet).to("cpu")
    assert pipe.unet is unet
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert {name: unet.config[name] for name in ("in_channels", "sample_size", "block_out_channels")} == {
        "in_channels": 1,
        "sample_size": 16,
        "block_out_channels": [16, 32],
    }
    assert _drawn(pipe, num_inference_steps=3).shape == (1, 1, 16, 16)
    with pytest.raises(GaqError, match=r"is not saved with a pipeline: copy .*unet\.plan and its \.json"):
        pipe.save_pretrained(tmp_path / "again")


def test_any_batch_is_cut_and_filled_to_what_the_engine_takes(tiny_model: LoadedModel, tmp_path: Path) -> None:
    file = _network_engine(tiny_model, tmp_path / "unet.plan", batch=(2, 2, 3))
    x = torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 99, 50, 7, 8, 9, 42])
    expected = tiny_model.network(x, t).detach()
    with EngineUNet(file) as unet:
        found = unet(x, t).sample
        alone = unet(x[:1], 0, return_dict=False)[0]
        half = unet(x[:2].half(), torch.tensor(99.0)).sample
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(alone, expected[:1], atol=2e-5, rtol=1e-4)
    assert half.dtype == torch.float16
    with pytest.raises(engines.EngineError, match="is closed"):
        unet(x, t)


def test_what_the_engine_does_not_take_is_one_line(unet: EngineUNet) -> None:
    x = torch.zeros(1, 1, 16, 16)
    with pytest.raises(GaqError, match=r"whole timesteps from 0 to 99; found \[1\.5\]"):
        unet(x, 1.5)
    with pytest.raises(GaqError, match=r"whole timesteps from 0 to 99; found \[100\]"):
        unet(x, 100)
    with pytest.raises(GaqError, match=r"takes no condition beside sample and timestep; found \['class_labels'\]"):
        unet(x, 1, class_labels=torch.tensor([1]))
    with pytest.raises(GaqError, match=r"takes no cross_attention_kwargs, mid_block_additional_residual"):
        unet(x, 1, cross_attention_kwargs={"scale": 1}, mid_block_additional_residual=x, timestep_cond=None)


def _network_engine(model: LoadedModel, out: Path, batch: tuple[int, int, int] = (1, 2, 4)) -> EngineFile:
    """Return a float engine of the network alone."""
    record = EngineRecord(provenance=Provenance.of(model, model.spec.sampler), graph=GraphKind.EPS, bits="float")
    save_onnx(build.export_float(model.network, model.shape, model.condition_inputs), out.with_suffix(".onnx"))
    config = EngineConfig(backend="openvino", threads=1, batch=batch)
    return engines.build(out.with_suffix(".onnx"), out, config, record.to_json())


def test_a_latent_pipeline_decodes_what_our_sampler_draws(
    unet: EngineUNet, as_pipelines_draw_it: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    codes = VQModel(in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=4)
    pipe = LDMPipeline(vqvae=codes.eval(), unet=unet, scheduler=DDIMScheduler(**TRAINED))
    found = _drawn(pipe, batch_size=2, num_inference_steps=10)
    as_pipelines_draw_it()
    latents = _by_us(unet, SamplerSpec(steps=10), 2)
    with torch.no_grad():
        expected = codes.decode(latents / codes.config.scaling_factor).sample
    assert _psnr(found, expected.clamp(-1, 1)) > SAME_DB


@pytest.fixture(scope="module")
def text_model() -> LoadedModel:
    """A tiny network that takes a prompt, on latents of 4x8x8."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    schedule = schedule_from_scheduler_config(dict(DDIMScheduler(**LATENT).config))
    return wrap(unet, shape=(4, 8, 8), schedule=schedule)


def test_a_stable_diffusion_pipeline_draws_what_our_sampler_does_with_guidance(
    text_model: LoadedModel, tmp_path: Path
) -> None:
    file = _network_engine(text_model, tmp_path / "unet.plan")
    torch.manual_seed(1)
    decoder = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8,), norm_num_groups=4
    ).eval()
    x = loop.noise((0, 1), 0, (4, 8, 8))
    spec = SamplerSpec(steps=5, spacing="from-1")
    with EngineUNet(file) as unet:
        parts = {"vae": decoder, **_words(), "unet": unet, "safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**LATENT), requires_safety_checker=False)
        texts = ["a six", "one"]
        found = _drawn(pipe, prompt=texts, latents=x, num_inference_steps=spec.steps, guidance_scale=3.0)
        rows, unconditional = pipe.encode_prompt(texts, torch.device("cpu"), 1, True)
    table, unconditional = {TEXT: rows}, {TEXT: unconditional[:1]}
    conditioning = Conditioning(names=("a six", "one"), rows=table, unconditional=unconditional, guidance=3.0)
    with engines.open_engine(file) as opened:
        sampling = replace(text_model, conditioning=conditioning).sampling(spec)
        draw = session.draw_with_network(engine_denoiser(opened), sampling)
        latents = draw((0, 1), lambda: None)
    with torch.no_grad():
        expected = decoder.decode(latents / decoder.config.scaling_factor).sample
    assert _psnr(found, expected.clamp(-1, 1)) > SAME_DB


def _words() -> dict[str, object]:
    """Return a tokenizer of letters and a text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [f"{letter}{end}" for letter in "aeinosx" for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    torch.manual_seed(2)
    return {
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        "text_encoder": CLIPTextModel(config).eval(),
    }


def test_steps_with_guidance_inside_give_a_pipeline_the_plain_noise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
        **blocks,
    )
    spec, schedule = SamplerSpec(steps=4), linear_schedule(num_train=100)
    conditioning = class_conditioning((0, 1, 2), unconditional=3, guidance=2.0)
    model = wrap(unet, shape=(1, 8, 8), schedule=schedule, sampler=spec, conditioning=conditioning)
    file = build.build_float(model, tmp_path / "unet.plan", config=SMALL)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 3])
    with EngineUNet(file) as engine:
        found = engine(x, timesteps(spec, 100)[1], class_labels=labels, return_dict=False)[0]
        with pytest.raises(GaqError, match=r"takes \['class_labels'\] beside sample and timestep; found nothing"):
            engine(x, 0)
    with torch.no_grad():
        expected = unet(x, timesteps(spec, 100)[1], class_labels=labels).sample
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
