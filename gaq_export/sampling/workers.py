"""Who draws shards: this process, several on this machine, or actors on a Ray cluster; the same images whoever it is.

Every worker has an engine of its own, on a CPU with one thread, and draws batches of one size. So an image's arithmetic
does not depend on how many workers there are. (It does on the processor: runtimes choose their kernels by it.)
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engines
from engines import EngineFile
from gaq_export.deploy import session
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor
from gaq_export.models import provenance
from gaq_export.sampling import batches

Task = tuple[int, tuple[int, ...]]  # number of a shard, seeds of its images
Drawn = tuple[int, Tensor]  # number of a shard, its images (N, C, H, W) uint8


class Worker:
    """An open engine that draws shards.

    Args:
        path: the engine file.
        spec: the sampler.
        batch: images at a time.
        conditioning: what to draw; what the engine file says if None.
    """

    def __init__(self, path: Path, spec: SamplerSpec, batch: int, conditioning: Conditioning | None) -> None:
        torch.set_num_threads(1)
        file = engines.load_engine_file(path)
        file = replace(file, threads=1)
        schedule, shape = provenance.schedule_of(file.about), provenance.shape_of(file.about)
        with ExitStack() as stack:
            opened = stack.enter_context(session.open_engines(file))
            decode = stack.enter_context(session.open_decoder(file))
            self._engines = stack.pop_all()
        self._some = session.by_engine(opened, file, schedule, shape, spec, decode, conditioning)
        self._batch, self._steps = batch, spec.steps

    def draw(self, task: Task) -> Drawn:
        """Draw one shard."""
        index, seeds = task
        images = batches.draw(self._some, seeds, self._batch, self._steps, lambda done, total: None)
        return index, to_uint8_tensor(images)

    def close(self) -> None:
        """Close the engines."""
        self._engines.close()


def here(
    file: EngineFile, spec: SamplerSpec, batch: int, conditioning: Conditioning | None, tasks: Sequence[Task]
) -> Iterator[Drawn]:
    """Draw in this process, in order."""
    worker = Worker(file.path, spec, batch, conditioning)
    try:
        yield from map(worker.draw, tasks)
    finally:
        worker.close()


_worker: Worker  # of a process of `beside`


def _start(path: Path, spec: SamplerSpec, batch: int, conditioning: Conditioning | None) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(path, spec, batch, conditioning)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed, which would leave it waiting for tasks for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _draw(task: Task) -> Drawn:
    return _worker.draw(task)


def beside(
    file: EngineFile,
    spec: SamplerSpec,
    batch: int,
    conditioning: Conditioning | None,
    tasks: Sequence[Task],
    workers: int,
) -> Iterator[Drawn]:
    """Draw in several processes on this machine, in the order in which they finish.

    Raises:
        GaqError: a process died; what was yielded before stays good.
    """
    context, start = get_context("spawn"), (file.path, spec, batch, conditioning)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=start) as pool:
        waiting: set[Future[Drawn]] = set()
        left = iter(tasks)
        try:
            while True:
                waiting |= {pool.submit(_draw, task) for task in islice(left, 2 * workers - len(waiting))}
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise GaqError(
                "A worker died, most likely killed for want of memory. The same command goes on where this one "
                "stopped; give fewer --workers if it happens again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def on_ray(
    file: EngineFile,
    spec: SamplerSpec,
    batch: int,
    conditioning: Conditioning | None,
    tasks: Sequence[Task],
    address: str,
) -> Iterator[Drawn]:
    """Draw on a Ray cluster, an actor on each of its CPUs; what a lost actor was drawing is drawn again elsewhere.

    Args:
        file: the engine; its files travel to the actors.
        spec: the sampler.
        batch: images at a time.
        conditioning: what to draw; what the engine file says if None.
        tasks: what to draw.
        address: of the cluster, or "local" for one of this machine's own.

    Raises:
        GaqError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise GaqError("Ray is not installed: pip install 'gaq-export[ray]'.") from None
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True, **options)
    except (ConnectionError, ValueError) as error:
        raise GaqError(f"No Ray cluster at {address!r}: {' '.join(str(error).split())}") from error
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        count = min(len(tasks), max(1, int(resources.get("CPU", 1))))
        content = ray.put({path.name: path.read_bytes() for path in files_of(file)})
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Actor)
        pool = ActorPool([actor.remote() for _ in range(count)])
        yield from pool.map_unordered(
            lambda one, task: one.draw.remote(content, file.path.name, spec, batch, conditioning, task), list(tasks)
        )
    finally:
        ray.shutdown()


class _Actor:
    """A `Worker` on another machine: writes the engine's files down when it is first asked, and opens them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._worker: Worker | None = None

    def draw(
        self,
        content: Mapping[str, bytes],
        name: str,
        spec: SamplerSpec,
        batch: int,
        conditioning: Conditioning | None,
        task: Task,
    ) -> Drawn:
        """Draw one shard with the engine `name` out of the files in `content`."""
        if self._worker is None:
            for file, data in content.items():
                Path(self._folder.name, file).write_bytes(data)
            self._worker = Worker(Path(self._folder.name, name), spec, batch, conditioning)
        return self._worker.draw(task)


def files_of(file: EngineFile) -> list[Path]:
    """Return all files that an engine needs: plan, record, weights, texts, and those of engines its record names."""
    decoder, texts = (
        (file.about.get(part) or {}).get(key) for part, key in (("decoder", "engine"), ("conditions", "file"))
    )
    beside = [*(file.about.get("relay") or {}).get("engines", ()), *([decoder] if decoder else [])]
    plans = [file.path, *(file.path.with_name(one["file"]) for one in beside)]
    found = [path for plan in plans for path in engines.files_of(plan) if path.exists()]
    return [*found, file.path.with_name(texts)] if texts else found


def choose(
    file: EngineFile,
    spec: SamplerSpec,
    batch: int,
    conditioning: Conditioning | None,
    workers: int,
    address: str | None,
) -> Callable[[Sequence[Task]], Iterator[Drawn]]:
    """Return who draws: Ray if there is an address, else as many processes as `workers`."""
    if address is not None:
        return lambda tasks: on_ray(file, spec, batch, conditioning, tasks, address)
    if workers > 1:
        return lambda tasks: beside(file, spec, batch, conditioning, tasks, workers)
    return lambda tasks: here(file, spec, batch, conditioning, tasks)
