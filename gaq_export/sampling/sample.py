"""Draw images with an engine: a few as PNGs, or any number as shards."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import engines
from gaq_export.deploy import session
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models import provenance
from gaq_export.models.loader import LoadedModel
from gaq_export.sampling import batches, shards
from gaq_export.sampling.batches import Sampled, Streamed
from gaq_export.sampling.workers import choose


def sample(
    engine: str | Path = "unet.plan",
    *,
    num: int = 16,
    seed: int = 0,
    batch: int | None = None,
    sampler: SamplerSpec | None = None,
    out: str | Path = "samples",
    compare: bool = False,
    conditioning: Conditioning | None = None,
    model: LoadedModel | None = None,
    on_step: Callable[[str, int, int], None] = lambda who, done, total: None,
) -> Sampled:
    """Run the whole denoising loop and write PNGs, a grid and samples.json.

    Args:
        engine: the engine file.
        num: number of images; image i has seed `seed + i`.
        seed: of the first image.
        batch: images at a time, within the engine's profile; its best batch if None.
        sampler: how to draw; what the engine file says if None. An engine of steps knows no other.
        out: folder for the pictures.
        compare: draw the same images with the float model too, side by side with PSNR.
        conditioning: what to draw; what the engine file says if None.
        model: the float model for `compare`; found again from the engine file if None.
        on_step: told who draws ("engine" or "float") and how many network calls are done, of how many.

    Raises:
        GaqError, EngineError: no images asked for, a batch outside the profile, a sampler that the engine does not
            have, an engine that cannot run here.
    """
    for what, count in (("images to draw", num), ("images at a time", batch)):
        if count is not None and count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
    file = engines.load_engine_file(engine)
    session.require_pictures(file)
    spec = session.sampler_of(file, sampler)
    schedule, shape = provenance.schedule_of(file.about), provenance.shape_of(file.about)
    size = file.batch[1] if batch is None else batch
    seeds = tuple(range(seed, seed + num))
    batches.check_writable(Path(out))
    conditioning = conditioning or session.default_conditioning(file)
    float_model = provenance.model_of(file.about, model, file.path.parent) if compare else None
    with session.open_engines(file) as opened, session.open_decoder(file) as decode:
        started = time.perf_counter()
        some = session.by_engine(opened, file, schedule, shape, spec, decode, conditioning)
        drawn = batches.draw(some, seeds, size, spec.steps, partial(on_step, "engine"))
        seconds = time.perf_counter() - started
    reference = None
    if float_model is not None:
        decode = session.decoding(float_model.decoder)
        some = session.by_network(float_model.network, schedule, shape, spec, conditioning=conditioning, decode=decode)
        reference = batches.draw(some, seeds, size, spec.steps, partial(on_step, "float"))
    return batches.write(Path(out), file, spec, conditioning, seeds, drawn, reference, seconds)


def sample_shards(
    engine: str | Path = "unet.plan",
    *,
    num: int,
    seed: int = 0,
    batch: int | None = None,
    sampler: SamplerSpec | None = None,
    out: str | Path = "samples",
    shard: int = 256,
    conditioning: Conditioning | None = None,
    workers: int = 1,
    ray: str | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Streamed:
    """Draw any number of images to files of `shard` images each; the same call again draws what is missing.

    Args:
        engine: the engine file.
        num: number of images; image i has seed `seed + i`.
        seed: of the first image.
        batch: images at a time, within the engine's profile; its best batch if None.
        sampler: as for `sample`.
        out: folder for the files, see `gaq_export.sampling.shards`.
        shard: images in a file.
        conditioning: as for `sample`.
        workers: processes that draw, one thread each.
        ray: address of a Ray cluster that draws instead, or "local".
        on_images: told how many images there are, of how many.

    Raises:
        GaqError, EngineError: as for `sample`; a folder that holds other images; a worker that died.
    """
    for what, count in (("images to draw", num), ("images a shard", shard), ("workers", workers)):
        if count < 1:
            raise GaqError(f"Found {count} {what}; ask for 1 or more.")
    file, out = engines.load_engine_file(engine), Path(out)
    session.require_pictures(file)
    spec = session.sampler_of(file, sampler)
    size = file.batch[1] if batch is None else batch
    if not file.batch[0] <= size <= file.batch[2]:
        raise GaqError(f"Found {size} images at a time; this engine takes {file.batch[0]} to {file.batch[2]}.")
    batches.check_writable(out)
    conditioning = conditioning or session.default_conditioning(file)
    identity = batches.provenance_record(file, spec, conditioning)
    order = shards.Order(num=num, seed=seed, shard=shard, batch=size, identity=identity)
    shards.claim(out, order)
    todo = shards.missing(out, order)
    done = num - sum(len(order.seeds(index)) for index in todo)
    started, drawn = time.perf_counter(), 0
    on_images(done, num)
    draw = choose(file, spec, size, conditioning, min(workers, len(todo)), ray)
    for index, images in draw([(index, order.seeds(index)) for index in todo]) if todo else ():
        shards.write_shard(out, order, index, images)
        drawn += len(images)
        on_images(done + drawn, num)
    grid = batches.write_overview(out, file, identity, conditioning, *next(shards.read_shards(out)))
    return Streamed(
        folder=out, grid=grid, drawn=drawn, seconds=time.perf_counter() - started, digest=shards.digest(out)
    )
