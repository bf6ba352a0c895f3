"""Who draws, and with which sampler: an engine of whole steps, an engine of the network alone, or the float network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import engines
from calib.correction import Correction
from calib.data import NO_CONDITION
from engines import Engine, EngineFile
from engines.engine_switch import EngineSwitch
from gaq_export.deploy import step_loop
from gaq_export.deploy.step_loop import engine_denoiser
from gaq_export.deploy.submodels import IMAGES, LATENTS, run_text
from gaq_export.diffusion import samplers
from gaq_export.diffusion.conditioning import Conditioning, bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.diffusion.samplers import Decode
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.models.provenance import conditioning_of, shape_of
from gaq_export.models.text_encoder import Texts

Draw = Callable[[Sequence[int], Callable[[], None]], Tensor]  # draws an image for each seed, and tells of every step


def sampler_of(file: EngineFile, asked: SamplerSpec | None) -> SamplerSpec:
    """Return the sampler to draw with: the engine's, or the one asked for.

    Raises:
        GaqError: an engine of whole steps has another one.
    """
    own = SamplerSpec.from_json(file.about["sampler"])
    if asked not in (None, own) and file.about.get("correction"):
        raise GaqError(f"{file.path} corrects its noise for {own} only; asked for {asked}. Build with --no-correction.")
    if asked not in (None, own) and file.about["graph"] == "step":
        raise GaqError(
            f"{file.path} holds the steps of {own}; asked for {asked}. Build another engine for it, or one with "
            "--graph eps, which takes any sampler."
        )
    return asked or own


def describe_relay(others: Sequence[EngineFile], turns: Sequence[int]) -> dict[str, Any]:
    """Return what the record of the engine for the largest of `turns` says of the others, which have the smaller.

    Args:
        others: those engines, by rising bits.
        turns: activation bits of each step.
    """
    order = sorted(set(turns))
    return {
        "engines": [named(file) for file in others],
        "turns": [order.index(bits) for bits in turns],
    }


def open_engines(file: EngineFile) -> Engine:
    """Open an engine file and those that take turns with it, if any, on as many threads; use it in a `with` statement.

    Raises:
        GaqError: one of the others is of another build.
        EngineError: one is missing, damaged, or cannot run here.
    """
    others = others_of(file)
    if not others:
        return engines.open_engine(file)
    with ExitStack() as stack:
        files = (*(replace(other, threads=file.threads) for other in others), file)
        opened = [stack.enter_context(engines.open_engine(one)) for one in files]
        stack.pop_all()
    return EngineSwitch(opened, file.about["relay"]["turns"], "step")


def others_of(file: EngineFile) -> tuple[EngineFile, ...]:
    """Return the engine files that take turns with this one; raise as `open_engines` does."""
    return tuple(_beside(file, other) for other in (file.about.get("relay") or {"engines": ()})["engines"])


def _beside(file: EngineFile, named: Mapping[str, str]) -> EngineFile:
    """Return an engine file that the record of another names; raise GaqError if it is of another build."""
    other = engines.load_engine_file(file.path.with_name(named["file"]))
    if other.sha256 != named["sha256"]:
        raise GaqError(f"{other.path} and {file.path} are of different builds: run build-engine again.")
    return other


def named(file: EngineFile) -> dict[str, str]:
    """Return what the record of another engine, in the same folder, says of this one."""
    return {"file": file.path.name, "sha256": file.sha256}


def decoder_of(file: EngineFile) -> EngineFile | None:
    """Return the engine file of the decoder of the latents this one draws, if there is one; raise as `others_of`."""
    kept = (file.about.get("decoder") or {}).get("engine")
    return None if kept is None else _beside(file, kept)


@contextmanager
def open_decoder(file: EngineFile) -> Iterator[Decode | None]:
    """Open the decoder that belongs to an engine file, on as many threads; yield None if it has none."""
    other = decoder_of(file)
    if other is None:
        yield None
        return
    with engines.open_engine(replace(other, threads=file.threads)) as opened:
        yield lambda x: torch.from_numpy(opened({LATENTS: x.numpy()})[IMAGES])


def require_pictures(file: EngineFile) -> None:
    """Raise GaqError if what an engine file draws are latents, with no decoder beside it that makes images of them."""
    channels = image_shape(file)[0]
    if channels not in (1, 3):
        raise GaqError(
            f"{file.path} draws latents of {channels} channels and has no decoder of them beside it: calibrate and "
            "build from a pipeline folder, with a vae/ or a vqvae/ beside the network."
        )


@contextmanager
def open_texts(file: EngineFile) -> Iterator[Texts]:
    """Open the text encoders that belong to an engine file, for `texts.encode` and `texts.told`.

    Raises:
        GaqError: it has none, they are of another build, or the tokenizers' library is not installed.
        EngineError: one is missing, damaged, or cannot run here.
    """
    kept = file.about.get("texts")
    if kept is None:
        raise GaqError(
            f"{file.path} has no text encoders beside it: build it where transformers is installed, from a model whose "
            "folder has a text_encoder/."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise GaqError("Prompts need a tokenizer: pip install 'gaq-export[text]'.") from None
    files = [replace(_beside(file, named), threads=file.threads) for named in kept["engines"]]
    tokens = [_tokens(file, named) for named in kept["tokens"]]
    with ExitStack() as stack:
        opened = [stack.enter_context(engines.open_engine(one)) for one in files]
        yield Texts(
            tokenizers=tuple(Tokenizer.from_str(text) for text in tokens),
            encoders=tuple(run_text(engine, one) for engine, one in zip(opened, files, strict=True)),
            zeros=kept["zeros"],
            time_ids=None if kept["time_ids"] is None else torch.tensor(kept["time_ids"]),
        )


def _tokens(file: EngineFile, named: Mapping[str, str]) -> str:
    path = file.path.with_name(named["file"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GaqError(f"Cannot read {path}: {error.strerror}. Run build-engine again.") from error
    if engines.sha256_of(path) != named["sha256"]:
        raise GaqError(f"{path} and {file.path} are of different builds: run build-engine again.")
    return content.decode()


def decoding(decoder: nn.Module | None) -> Decode | None:
    """Return what makes images with a decoder of PyTorch's, None if there is none."""
    return None if decoder is None else torch.no_grad()(decoder)


def image_shape(file: EngineFile) -> tuple[int, int, int]:
    """Return (C, H, W) of the images an engine file draws, its decoder behind it if it has one."""
    other = decoder_of(file)
    if other is None:
        return shape_of(file.about)
    _, channels, height, width = other.outputs[0].at_batch(1)
    return channels, height, width


def default_conditioning(file: EngineFile) -> Conditioning | None:
    """Return what the engine's images are told unless asked otherwise, None if that is nothing."""
    return conditioning_of(file.about, file.path.parent)


def by_engine(
    engine: Engine,
    file: EngineFile,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    spec: SamplerSpec,
    decode: Decode | None = None,
    conditioning: Conditioning | None = None,
) -> Draw:
    """Draw with an open engine.

    Args:
        engine: the engine.
        file: it was opened from.
        schedule: the noise schedule.
        shape: (C, H, W) of what the loop draws.
        spec: the sampler.
        decode: makes images of latents, see `open_decoder`.
        conditioning: what to draw; what the file says if None.
    """
    conditioning = conditioning or default_conditioning(file)
    if file.about["graph"] == "step":
        return lambda seeds, report_step: step_loop.run(
            engine,
            seeds,
            shape,
            spec.steps,
            lambda step: report_step(),
            NO_CONDITION if conditioning is None else conditioning.feeds(seeds),
            decode,
            schedule.clip,
        )
    kept = file.about.get("correction")
    correction, network = kept and Correction.from_json(kept), engine_denoiser(engine)
    return by_network(network, schedule, shape, spec, correction, conditioning, decode, apart=True)


def by_network(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    spec: SamplerSpec,
    correction: Correction | None = None,
    conditioning: Conditioning | None = None,
    decode: Decode | None = None,
    *,
    apart: bool = False,
) -> Draw:
    """Draw with anything called as (x, t), or (x, t, cond) if it is told something; its noise corrected.

    With `apart` it is called twice for guidance, as engines are whose batch has an end.
    """

    def draw(seeds: Sequence[int], report_step: Callable[[], None]) -> Tensor:
        bound = bind(network, conditioning, seeds, apart=apart)
        return samplers.run(
            bound, seeds, shape, schedule, spec, lambda step, x, t: report_step(), correction=correction, decode=decode
        )

    return draw


def noise_for(engine: Engine, file: EngineFile, schedule: NoiseSchedule, seeds: Sequence[int]) -> Denoiser:
    """Make an open engine of either kind a denoiser for images of these seeds, with guidance if there is any."""
    network, conditioning = noise_of(engine, file, schedule), default_conditioning(file)
    if conditioning is None or file.about["graph"] != "step":
        return bind(network, conditioning, seeds, apart=True)
    feeds = conditioning.feeds(seeds)
    return lambda x, t, /: network(x, t, feeds)


def noise_of(engine: Engine, file: EngineFile, schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Make an open engine of either kind a denoiser, which an engine of whole steps is at its own timesteps only."""
    if file.about["graph"] != "step":
        return engine_denoiser(engine)
    return step_loop.step_denoiser(engine, timesteps(sampler_of(file, None), schedule.num_train))
