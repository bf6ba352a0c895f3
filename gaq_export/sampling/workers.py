"""Draw shards in this process, in several on this machine, or in actors on a Ray cluster: the same images every time.

Every worker opens the engine for itself, on a CPU with one thread, and draws batches of one size. So an image's
arithmetic does not depend on the number of workers. (It does depend on the processor, since runtimes choose kernels by
it.)
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from torch import Tensor

import engines
from engines import EngineFile, EngineWarning
from gaq_export.cluster.connection import connected
from gaq_export.deploy import session
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.batching import draw_in_batches
from gaq_export.diffusion.loop import Sampling
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor

Task = tuple[int, tuple[int, ...]]  # number of a shard, seeds of its images
Drawn = tuple[int, Tensor]  # number of a shard, its images (N, C, H, W) uint8
DrawShards = Callable[[Sequence[Task]], Iterator[Drawn]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know.

    Attributes:
        file: the engine.
        sampling: how to draw, without a decoder, which each worker opens itself.
        batch: images at a time.
    """

    file: EngineFile
    sampling: Sampling
    batch: int


class Worker:
    """An open engine that draws shards on one thread."""

    def __init__(self, job: Job) -> None:
        # One thread each: workers share the machine without slowing each other down, and sums keep their order.
        torch.set_num_threads(1)
        file = replace(engines.load_engine_file(job.file.path), threads=1, gpu=job.file.gpu)
        with ExitStack() as stack:
            opened = stack.enter_context(session.open_engines(file))
            decode = stack.enter_context(session.open_decoder(file))
            self._engines = stack.pop_all()  # they stay open until `close`; an error before this line closes them
        self._draw = session.draw_with_engine(opened, file, replace(job.sampling, decode=decode))
        self._batch = job.batch
        self._steps = job.sampling.sampler.steps

    def draw(self, task: Task) -> Drawn:
        """Draw one shard."""
        index, seeds = task
        images = draw_in_batches(self._draw, seeds, self._batch, self._steps, lambda done, total: None)
        return index, to_uint8_tensor(images)

    def close(self) -> None:
        """Close the engines."""
        self._engines.close()


def draw_here(job: Job, tasks: Sequence[Task]) -> Iterator[Drawn]:
    """Draw in this process, in order."""
    worker = Worker(job)
    try:
        yield from map(worker.draw, tasks)
    finally:
        worker.close()


_worker: Worker  # in each process of `draw_in_processes`, because an open engine cannot be sent with a task


def _start(job: Job) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", EngineWarning)  # the process that started this one has said it, once
    _worker = Worker(job)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed; otherwise it would wait for tasks for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # from a thread, `sys.exit` would end only the thread


def _draw(task: Task) -> Drawn:
    return _worker.draw(task)


def draw_in_processes(job: Job, tasks: Sequence[Task], workers: int) -> Iterator[Drawn]:
    """Draw in several processes on this machine, in the order in which they finish.

    Raises:
        GaqError: a process died; the shards yielded before that are complete.
    """
    engines.warn_of_processor(job.file)
    # Not "fork": a copy of a process whose libraries run threads may wait for ever for a lock that one of them holds.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job,)) as pool:
        waiting: set[Future[Drawn]] = set()
        left = iter(tasks)
        try:
            while True:
                # Two tasks a worker: none idles, and a killed run has few shards under way.
                waiting |= {pool.submit(_draw, task) for task in islice(left, 2 * workers - len(waiting))}
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise GaqError(
                "A worker died, most likely because memory ran out. The same command goes on where this one "
                "stopped; give fewer --workers if it happens again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def draw_on_ray(job: Job, tasks: Sequence[Task], address: str) -> Iterator[Drawn]:
    """Draw on a Ray cluster, an actor on each of its CPUs; what a lost actor was drawing is drawn again elsewhere.

    Args:
        job: the engine, whose files travel to the actors, and how to draw.
        tasks: the shards.
        address: of the cluster, or "local" to start one on this machine.

    Raises:
        GaqError: Ray is not installed, or there is no cluster at the address.
    """
    with connected(address) as cluster:
        from ray.util import ActorPool  # it is installed, as the line above has seen

        # An actor whose engine is of a GPU has one for itself; the others have a core.
        on_gpu = engines.find_backend(job.file.backend).on_gpu
        if on_gpu and not cluster.gpus:
            raise GaqError(
                f"{job.file.path} needs a GPU ({job.file.backend}), and the cluster at {address!r} has none."
            )
        count = min(len(tasks), cluster.gpus if on_gpu else cluster.cpus)
        # The files travel as one object in Ray's store, since the machines need not share a disk.
        content = cluster.ray.put({path.name: path.read_bytes() for path in files_of(job.file)})
        # -1 is without limit: machines of a cluster may come and go.
        actor = cluster.ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_restarts=-1, max_task_retries=-1)(_Actor)
        pool = ActorPool([actor.remote() for _ in range(count)])
        yield from pool.map_unordered(lambda one, task: one.draw.remote(content, job, task), list(tasks))


class _Actor:
    """A `Worker` on another machine: on its first task it writes the engine's files down and opens them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._worker: Worker | None = None

    def draw(self, content: Mapping[str, bytes], job: Job, task: Task) -> Drawn:
        """Draw one shard with the job's engine, out of the files in `content`."""
        if self._worker is None:
            for name, data in content.items():
                Path(self._folder.name, name).write_bytes(data)
            # Ray shows an actor its own GPU alone, as number 0.
            here = replace(job.file, path=Path(self._folder.name, job.file.path.name), gpu=0)
            self._worker = Worker(replace(job, file=here))
        return self._worker.draw(task)


def files_of(file: EngineFile) -> list[Path]:
    """Return all files that an engine needs to draw images: engine, record, weights, and those its record names."""
    record = record_of(file)
    texts = record.provenance.conditioning and record.provenance.conditioning["file"]  # None for classes
    switching = record.switching.engines if record.switching else ()
    linked = [*switching, *([record.decoder] if record.decoder else [])]
    built = [file.path, *(file.path.with_name(link.file) for link in linked)]
    present = [path for engine in built for path in engines.files_of(engine) if path.exists()]
    return [*present, file.path.with_name(texts)] if texts else present


def choose_workers(job: Job, workers: int, address: str | None) -> DrawShards:
    """Return the function that draws: on Ray if there is an address, else in as many processes as `workers`."""
    if address is not None:
        return lambda tasks: draw_on_ray(job, tasks, address)
    if workers > 1:
        return lambda tasks: draw_in_processes(job, tasks, workers)
    return lambda tasks: draw_here(job, tasks)
