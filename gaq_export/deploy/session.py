"""From an engine file to something that draws: open it with the files it needs, and say how it samples.

An engine computes whole denoising steps, or the predicted noise alone (`GraphKind`). `draw_with_engine` and
`draw_with_network` make a `Draw` of either kind, and of a PyTorch network, so whoever draws need not know which.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import engines
from engines import Engine, EngineFile
from engines.engine_switch import EngineSwitch
from gaq_export.deploy import step_loop
from gaq_export.deploy.record import LinkedFile, record_of
from gaq_export.deploy.submodels import IMAGES, LATENTS, run_text
from gaq_export.diffusion import loop
from gaq_export.diffusion.batching import Draw
from gaq_export.diffusion.conditioning import ConditionalNetwork, Conditioning, bind
from gaq_export.diffusion.denoiser import Denoiser, engine_denoiser
from gaq_export.diffusion.loop import Decode, Sampling
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.folders import inside
from gaq_export.models.provenance import load_conditioning
from gaq_export.models.text_encoder import Texts


def sampling_of(
    file: EngineFile, sampler: SamplerSpec | None = None, conditioning: Conditioning | None = None
) -> Sampling:
    """Return how an engine draws, without its decoder, which has to be opened first.

    Args:
        file: the engine file.
        sampler: another sampler; the engine's if None.
        conditioning: what to draw; what the engine's record says if None.

    Raises:
        GaqError: an engine of whole steps, or one that corrects its noise, cannot use another sampler.
        CalibError, GaqError: the file with the record's text states is missing, damaged, or not the recorded one.
    """
    record = record_of(file)
    # A correction is measured at one sampler's steps, and a graph of whole steps holds one sampler's coefficients.
    built_for = record.provenance.sampler
    if sampler not in (None, built_for) and record.correction is not None:
        raise GaqError(
            f"{file.path} corrects its noise for {built_for} only, not for {sampler}. Build with --no-correction."
        )
    if sampler not in (None, built_for) and record.whole_steps:
        raise GaqError(
            f"{file.path} holds the steps of {built_for}, not those of {sampler}. Build another engine for it, or one "
            "with --graph eps, which takes any sampler."
        )
    return Sampling(
        schedule=record.provenance.schedule,
        shape=record.provenance.shape,
        sampler=sampler or built_for,
        conditioning=conditioning or load_conditioning(record.provenance, file.path.parent),
        correction=record.correction,
    )


def open_engines(file: EngineFile) -> Engine:
    """Open an engine file and those that take turns with it, if any, all alike; use it in a `with` statement.

    Raises:
        GaqError: one of the others is of another build.
        EngineError: one is missing, damaged, or cannot run here.
    """
    switching = record_of(file).switching
    if switching is None:
        return engines.open_engine(file)
    with ExitStack() as stack:  # closes what is already open if a later engine cannot be opened
        # This engine comes last, as `Switching.turns` counts.
        files = (*(_opened_as(file, other) for other in others_of(file)), file)
        opened = [stack.enter_context(engines.open_engine(one)) for one in files]
        stack.pop_all()  # from here on the switch closes them
    return EngineSwitch(opened, switching.turns, "step")


def others_of(file: EngineFile) -> tuple[EngineFile, ...]:
    """Return the engine files that take turns with this one; raise as `open_engines` does."""
    switching = record_of(file).switching
    return () if switching is None else tuple(_linked(file, other) for other in switching.engines)


def _linked(file: EngineFile, link: LinkedFile) -> EngineFile:
    """Return an engine file that the record of another names; raise GaqError if it is of another build."""
    other = engines.load_engine_file(inside(file.path.parent, link.file))
    if other.sha256 != link.sha256:
        raise GaqError(f"{other.path} and {file.path} are of different builds: run build-engine again.")
    return other


def _opened_as(file: EngineFile, other: EngineFile) -> EngineFile:
    """Return another engine file, to be opened on the threads and the GPU that `file` is opened on."""
    return replace(other, threads=file.threads, gpu=file.gpu)


def decoder_of(file: EngineFile) -> EngineFile | None:
    """Return the engine file of the decoder of an engine's latents, None if it has none; raise as `others_of`."""
    link = record_of(file).decoder
    return None if link is None else _linked(file, link)


@contextmanager
def open_decoder(file: EngineFile) -> Iterator[Decode | None]:
    """Open the decoder that belongs to an engine file, as that is opened; yield None if it has none."""
    other = decoder_of(file)
    if other is None:
        yield None
        return
    with engines.open_engine(_opened_as(file, other)) as opened:
        yield lambda x: torch.from_numpy(opened({LATENTS: x.numpy()})[IMAGES])


def image_shape(file: EngineFile) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that an engine file draws, after its decoder if it has one."""
    other = decoder_of(file)
    if other is None:
        return record_of(file).provenance.shape
    _, channels, height, width = other.outputs[0].at_batch(1)  # (1, 3, H, W)
    return channels, height, width


def draws_pictures(file: EngineFile) -> bool:
    """Return whether what an engine file draws is gray or RGB, all that a PNG of ours holds.

    Latents of 3 channels pass for images.
    """
    return image_shape(file)[0] in (1, 3)


def require_pictures(file: EngineFile) -> None:
    """Raise GaqError if an engine file draws something else than pictures, such as latents without a decoder."""
    if not draws_pictures(file):
        raise GaqError(
            f"{file.path} draws {image_shape(file)[0]} channels, and pictures have 1 or 3. `sample` without --shard, "
            "--workers or --ray writes them as arrays; if they are latents, calibrate and build from a pipeline folder "
            "with a vae/ or a vqvae/ beside the network, or give wrap a decoder."
        )


@contextmanager
def open_texts(file: EngineFile) -> Iterator[Texts]:
    """Open the text encoders that belong to an engine file, for `text_encoder.prompt_conditioning`.

    Raises:
        GaqError: it has none, they are of another build, or the tokenizers' library is not installed.
        EngineError: one is missing, damaged, or cannot run here.
    """
    texts = record_of(file).text_encoders
    if texts is None:
        raise GaqError(
            f"{file.path} has no text encoders beside it: build it where transformers is installed, from a model whose "
            "folder has a text_encoder/."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise GaqError("Prompts need a tokenizer: pip install 'gaq-export[text]'.") from None
    # All files are checked before the first engine is opened.
    files = [_opened_as(file, _linked(file, link)) for link in texts.engines]
    tokenizers = [_read_tokenizer(file, link) for link in texts.tokenizers]
    with ExitStack() as stack:
        opened = [stack.enter_context(engines.open_engine(one)) for one in files]
        yield Texts(
            tokenizers=tuple(Tokenizer.from_str(text) for text in tokenizers),
            encoders=tuple(run_text(engine, one) for engine, one in zip(opened, files, strict=True)),
            zeros=texts.zeros,
            time_ids=None if texts.time_ids is None else torch.tensor(texts.time_ids),
        )


def _read_tokenizer(file: EngineFile, link: LinkedFile) -> str:
    path = inside(file.path.parent, link.file)
    try:
        sha256 = engines.sha256_of(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GaqError(f"Cannot read {path}: {error.strerror}. Run build-engine again.") from error
    if sha256 != link.sha256:
        raise GaqError(f"{path} and {file.path} are of different builds: run build-engine again.")
    return text


def draw_with_engine(engine: Engine, file: EngineFile, sampling: Sampling) -> Draw:
    """Return a function that draws with an open engine.

    Args:
        engine: the engine, see `open_engines`.
        file: the file it was opened from.
        sampling: how to draw, see `sampling_of`; with `decode` where the engine draws latents.
    """
    if record_of(file).whole_steps:
        return lambda seeds, on_step: step_loop.run(engine, seeds, sampling, lambda step: on_step())
    # An engine's largest batch may be the images' own, so guidance calls it twice.
    return draw_with_network(engine_denoiser(engine), sampling, apart=True)


def draw_with_network(network: ConditionalNetwork, sampling: Sampling, *, apart: bool = False) -> Draw:
    """Return a function that draws with anything called as (x, t) or (x, t, cond); `apart` as for `loop.run`."""

    def draw(seeds: Sequence[int], on_step: Callable[[], None]) -> Tensor:
        return loop.run(network, seeds, sampling, lambda step, x, t: on_step(), apart=apart)

    return draw


def noise_predictor(engine: Engine, file: EngineFile) -> ConditionalNetwork:
    """Return an open engine as a network that predicts noise; one of whole steps does so at its own timesteps only."""
    record = record_of(file)
    if not record.whole_steps:
        return engine_denoiser(engine)
    visited = timesteps(record.provenance.sampler, record.provenance.schedule.num_train)
    return step_loop.step_denoiser(engine, visited)


def denoiser_for(engine: Engine, file: EngineFile, seeds: Sequence[int]) -> Denoiser:
    """Return an open engine of either kind as a denoiser for images of these seeds, with guidance if there is any."""
    network = noise_predictor(engine, file)
    record = record_of(file)
    conditioning = load_conditioning(record.provenance, file.path.parent)
    if conditioning is None or not record.whole_steps:
        return bind(network, conditioning, seeds, apart=True)
    feeds = conditioning.feeds(seeds)  # both conditions, because guidance is inside the engine
    return lambda x, t, /: network(x, t, feeds)
