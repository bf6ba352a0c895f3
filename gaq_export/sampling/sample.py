"""Draw images with an engine: a few as PNGs, or as arrays where they are no pictures; or any number as shards.

In: an engine file, and a `Request` as keywords. Out: files in a folder, and a summary of what was drawn.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import engines
from engines import EngineFile
from engines.files import files_of
from gaq_export import folders
from gaq_export.deploy import session
from gaq_export.deploy.record import record_of
from gaq_export.devices import ON_HOST, Device
from gaq_export.diffusion.batching import Draw, OnProgress, check_seeds, draw_in_batches
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model
from gaq_export.sampling import arrays, png_folder, shards
from gaq_export.sampling.png_folder import Drawn, Sampled
from gaq_export.sampling.workers import DrawShards, Job, choose_workers


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What `sample_shards` did: `drawn` images in `seconds`; `digest` is the sha256 of all images in the folder."""

    folder: Path
    grid: Path
    drawn: int
    seconds: float
    digest: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which images to draw; `sample` and `sample_shards` take its fields as keywords.

    Attributes:
        num: number of images; image i has seed `seed + i`.
        seed: of the first image.
        batch: images at a time, within the engine's profile; its best batch if None.
        sampler: what to draw with; the engine's if None. An engine of whole steps takes no other.
        conditioning: what to draw; what the engine's record says if None.
        gpu: number of the GPU, from 0, for an engine of GPUs; on a Ray cluster Ray chooses.
        device: where a float model that is loaded again for `compare` draws.

    Raises:
        GaqError: no images, none at a time, or seeds that are negative or beyond 63 bits.
    """

    num: int = 16
    seed: int = 0
    batch: int | None = None
    sampler: SamplerSpec | None = None
    conditioning: Conditioning | None = None
    gpu: int = 0
    device: Device = ON_HOST

    def __post_init__(self) -> None:
        _at_least_one(("images to draw", self.num), ("images at a time", self.batch))
        check_seeds(self.seed, self.num)


class RequestFields(TypedDict, total=False):  # so that type checkers know the keywords of both functions
    """The fields of a `Request` as keywords."""

    num: int
    seed: int
    batch: int | None
    sampler: SamplerSpec | None
    conditioning: Conditioning | None
    gpu: int
    device: Device


def sample(
    engine: str | Path = "unet.plan",
    *,
    out: str | Path = "samples",
    compare: bool = False,
    model: LoadedModel | None = None,
    on_step: Callable[[str, int, int], None] = lambda who, done, total: None,
    **fields: Unpack[RequestFields],
) -> Sampled:
    """Run the whole denoising loop and write PNGs, a grid and samples.json.

    Images of other than one or three channels, such as latents without a decoder, go to `images.npz` instead.

    Args:
        engine: the engine file.
        out: folder for the pictures or arrays.
        compare: draw the same images with the float model too, side by side with PSNR.
        model: the float model for `compare`; loaded again from the engine's record if None.
        on_step: called with who draws ("engine" or "float"), network calls done, and network calls in all.
        fields: which images, and where, the fields of `Request`: num, seed, batch, sampler, conditioning, gpu,
            device.

    Raises:
        GaqError, EngineError: a batch outside the profile, a sampler that the engine does not have, an engine that
            cannot run here.
    """
    request = Request(**fields)
    file, sampling = _load(engine, request)
    _check_target(Path(out), file)
    batch = file.batch[1] if request.batch is None else request.batch  # batch[1]: the size that it was tuned for
    seeds = tuple(range(request.seed, request.seed + request.num))
    steps = sampling.sampler.steps
    png_folder.check_writable(Path(out))
    # Loaded before drawing begins, so that a model that cannot be loaded is reported at once.
    float_model = find_model(record_of(file).provenance, model, file.path.parent, request.device) if compare else None
    with session.open_engines(file) as opened, session.open_decoder(file) as decode:
        started = time.perf_counter()  # opening an engine is not drawing
        draw = session.draw_with_engine(opened, file, replace(sampling, decode=decode))
        images = draw_in_batches(draw, seeds, batch, steps, partial(on_step, "engine"))
        seconds = time.perf_counter() - started
    reference = None
    if float_model is not None:
        draw = _draw_with_float(float_model, sampling)
        reference = draw_in_batches(draw, seeds, batch, steps, partial(on_step, "float"))
    drawn = Drawn(seeds=seeds, images=images, reference=reference, seconds=seconds)
    write = png_folder.write_pngs if session.draws_pictures(file) else arrays.write_arrays
    return write(Path(out), file, sampling, drawn)


def sample_shards(
    engine: str | Path = "unet.plan",
    *,
    out: str | Path = "samples",
    shard: int = 256,
    workers: int = 1,
    ray: str | None = None,
    on_images: OnProgress = lambda done, total: None,
    **fields: Unpack[RequestFields],
) -> Streamed:
    """Draw any number of images to files of `shard` images each; the same call again draws what is missing.

    Args:
        engine: the engine file.
        out: folder for the files, see `gaq_export.sampling.shards`.
        shard: images in a file.
        workers: processes that draw, one thread each.
        ray: address of a Ray cluster that draws in their place, or "local".
        on_images: called with (images drawn, images in all).
        fields: which images, the fields of `Request`.

    Raises:
        GaqError, EngineError: as for `sample`; images that are no pictures; a folder that holds other images; a worker
            that died.
    """
    _at_least_one(("images a shard", shard), ("workers", workers))
    request = Request(**fields)
    if request.num > shard * shards.MOST:
        raise GaqError(
            f"{request.num} images in files of {shard} are more than {shards.MOST} files: put more into each, with "
            "--shard, or draw fewer."
        )
    out = Path(out)
    file, sampling = _load(engine, request)
    session.require_pictures(file)
    _check_target(out, file)
    batch = _batch_within(file, request.batch)
    png_folder.check_writable(out)
    order = shards.Order(
        num=request.num,
        seed=request.seed,
        shard=shard,
        batch=batch,
        identity=png_folder.image_facts(file, sampling),
    )
    shards.claim(out, order)
    todo = shards.missing(out, order, session.image_shape(file))
    started = time.perf_counter()
    draw = choose_workers(Job(file=file, sampling=sampling, batch=batch), min(workers, len(todo)), ray)
    drawn = _draw_shards(draw, out, order, todo, on_images)
    return Streamed(
        folder=out,
        grid=png_folder.write_overview(out, file, sampling, *next(shards.read_shards(out))),
        drawn=drawn,
        seconds=time.perf_counter() - started,
        digest=shards.digest(out),
    )


def _load(engine: str | Path, request: Request) -> tuple[EngineFile, Sampling]:
    """Return the engine file, and how it draws what was requested; raise as `sample` does."""
    file = replace(engines.load_engine_file(engine), gpu=request.gpu)
    return file, session.sampling_of(file, request.sampler, request.conditioning)


def _check_target(out: Path, file: EngineFile) -> None:
    """Raise GaqError if what is written to the folder `out` would take the place of one of the engine's files."""
    names = (shards.RECORD, "grid.png", arrays.NAME)
    folders.check_outputs([out / name for name in names], files_of(file.path))


def _draw_with_float(model: LoadedModel, sampling: Sampling) -> Draw:
    """Return a function that draws with the float model what an engine draws with `sampling`."""
    # The conditioning that was requested may differ from the recorded one. A float network needs no correction.
    model = replace(model, conditioning=sampling.conditioning)
    return session.draw_with_network(model.network, model.image_sampling(sampling.sampler))


def _draw_shards(draw: DrawShards, out: Path, order: shards.Order, todo: Sequence[int], on_images: OnProgress) -> int:
    """Draw the shards with these numbers and write each as soon as it is there; return the number of images drawn."""
    done = order.num - sum(len(order.seeds(index)) for index in todo)  # by an earlier call
    drawn = 0
    on_images(done, order.num)
    tasks = [(index, order.seeds(index)) for index in todo]
    for index, images in draw(tasks) if tasks else ():  # without tasks, no worker has to open the engine
        shards.write_shard(out, order, index, images)
        drawn += len(images)
        on_images(done + drawn, order.num)
    return drawn


def _batch_within(file: EngineFile, batch: int | None) -> int:
    """Return the batch to draw with; raise GaqError if the engine does not take it."""
    least, best, most = file.batch
    if batch is not None and not least <= batch <= most:
        raise GaqError(f"Found {batch} images at a time; this engine takes {least} to {most}.")
    return best if batch is None else batch


def _at_least_one(*counts: tuple[str, int | None]) -> None:
    for what, count in counts:
        if count is not None and count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
