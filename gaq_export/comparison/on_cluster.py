"""Measure the cells of a comparison on a Ray cluster, and calibrate with the candidates of `--recipe auto` there.

Each cell is a process with one thread, and a GPU to itself where the cluster has some. Its files come back as it writes
them, so a killed command goes on where it was. The machines need the package, and share nothing else with this one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from calib.choices import BudgetUnit
from gaq_export.cluster.connection import Cluster
from gaq_export.cluster.tasks import Done, Task, Tasks
from gaq_export.comparison import auto, runner
from gaq_export.comparison.auto import Tried
from gaq_export.comparison.spec import Cell, Comparison
from gaq_export.devices import ON_HOST, Device, find_device
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.calibrate import calibrate
from gaq_export.quantize.presets import Preset
from gaq_export.quantize.trajectories import collect
from gaq_export.quantize.verdict import judge
from gaq_export.run import Run

# What `runner.PREPARE` writes, beside the calibration sets.
_PREPARED = ("facts.json", "moments.safetensors", "held-out.safetensors", "float-images.safetensors")
_INPUTS = ".inputs"  # a name with a dot: not sent back
_LOG = "cluster.log"


def find_place(name: str, cluster: Cluster, *, tf32: bool = False) -> Device:
    """Return the device that each cell computes on.

    Args:
        name: as a user writes --device; "auto" is a GPU where the cluster has some.
        cluster: which GPU of it a cell gets is its decision.
        tf32: see `Device`.

    Raises:
        GaqError: the name is another, or the cluster has no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise GaqError(f"Found --device {name} with --ray; give auto, cpu or cuda: Ray decides which GPU a cell gets.")
    if name == "cuda" and not cluster.gpus:
        raise GaqError(f"Found --device cuda, but the Ray cluster at {cluster.address!r} has no GPU; use --device cpu.")
    on_gpu = name != "cpu" and cluster.gpus > 0
    return Device(place=torch.device("cuda", 0), tf32=tf32) if on_gpu else ON_HOST


def run(comparison: Comparison, say: Callable[[str], None], cluster: Cluster) -> list[Cell]:
    """Measure every missing cell on the cluster; return those that failed.

    Args:
        comparison: its model is on the host, whatever its `device` says: that is where each cell puts it.
        say: called with a line for each finished job.
        cluster: where to measure.

    Raises:
        GaqError: what all cells need could not be prepared.
    """
    gpu = _on_gpu(comparison.model)
    at_a_time = cluster.gpus if gpu else cluster.cpus
    tasks = Tasks(cluster, gpu=gpu, shared=_packed(replace(comparison, workers=at_a_time)))
    folder = comparison.yardstick.folder
    for done in tasks.run([_job(comparison, runner.PREPARE)], folder, _shared_files(comparison)):
        say(_line(done))
        if done.failed:
            raise GaqError(f"The preparation failed: see {folder / done.task.log}.")
    cells = {cell.name: cell for cell in runner.missing(comparison)}
    todo = [_job(comparison, name, _files_of(comparison, cell)) for name, cell in cells.items()]
    failed = []
    for done in tasks.run(todo, folder, _shared_files(comparison)):
        say(_line(done))
        failed += [cells[done.task.name]] if done.failed else []
    return failed


@dataclass(frozen=True, kw_only=True, eq=False)
class _Packed:
    """A comparison with the content of the files that it reads, for machines that do not have them."""

    comparison: Comparison
    data: bytes | None
    classifier: bytes | None


def _packed(comparison: Comparison) -> _Packed:
    yardstick = comparison.yardstick
    data, classifier = yardstick.data, yardstick.classifier
    return _Packed(
        comparison=comparison,
        data=None if data is None else data.read_bytes(),
        classifier=None if classifier is None else classifier.read_bytes(),
    )


def _work(packed: _Packed, folder: Path, job: str) -> None:
    """Do one job of a comparison in a folder on this machine, a cluster's."""
    yardstick = replace(
        packed.comparison.yardstick,
        model=_placed(packed.comparison.model),
        folder=folder,
        data=_unpacked(folder, "data.npz", packed.data),
        classifier=_unpacked(folder, "classifier.th", packed.classifier),
    )
    runner.work(replace(packed.comparison, yardstick=yardstick), job)


def _unpacked(folder: Path, name: str, content: bytes | None) -> Path | None:
    if content is None:
        return None
    path = folder / _INPUTS / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _placed(model: LoadedModel) -> LoadedModel:
    """Return a model that is on the host on the device that it names, which this machine must have."""
    device = model.device
    if device != ON_HOST:
        device = find_device(
            device.place.type, tf32=device.tf32
        )  # of this process, the GPU that Ray gave it is the first
    return replace(model, device=ON_HOST).on(device)


def _on_gpu(model: LoadedModel) -> bool:
    return model.device.place.type == "cuda"


def _job(comparison: Comparison, name: str, files: tuple[str, ...] = ()) -> Task:
    folder = comparison.yardstick.folder
    return Task(name=name, function=_work, arguments=(name,), folder=folder, files=files, log=f"logs/{name}.log")


def _shared_files(comparison: Comparison) -> list[str]:
    folder = comparison.yardstick.folder
    graphs = [path.name for path in folder.glob(f"{comparison.yardstick.float_graph.name}*")]
    return [*_PREPARED, "classifier.safetensors", *graphs, *(f"calibration-{seed}" for seed in comparison.seeds)]


def _files_of(comparison: Comparison, cell: Cell) -> tuple[str, ...]:
    """Return what a cell has written before: results, and folders of blocks."""
    start = comparison.path(cell, "")
    return tuple(f"cells/{path.name}" for path in start.parent.glob(f"{start.name}*"))


def _line(done: Done) -> str:
    log = done.task.folder / done.task.log
    return f"{done.task.name}: {f'failed, see {log}' if done.failed else 'done'}"


def choose(
    model: LoadedModel,
    candidates: Mapping[str, Preset],
    folder: Path,
    cluster: Cluster,
    on_step: noise_sqnr.OnStage = lambda what, done, total: None,
) -> list[Tried]:
    """Calibrate with each recipe on the cluster, and make `folder` the run of the best, as `auto.choose` does here.

    Args:
        model: the float model on the host; its `device` says where each candidate computes.
        candidates: preset with the recipe's settings, by recipe.
        folder: run folder.
        cluster: where to calibrate.
        on_step: called with (what is being done, done, total).

    Raises:
        GaqError: a candidate failed.
    """
    return choose_with(Tasks(cluster, gpu=_on_gpu(model), shared=model), candidates, folder, on_step)


class Runner(Protocol):
    """What has tasks done: `Tasks`, whose functions are given the model first."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Yield how each task has ended, in any order."""


def choose_with(
    tasks: Runner,
    candidates: Mapping[str, Preset],
    folder: Path,
    on_step: noise_sqnr.OnStage = lambda what, done, total: None,
) -> list[Tried]:
    """Do as `choose`, with whatever has the tasks done."""
    tried = {result.recipe: result for result in _tried(tasks, candidates, folder, on_step)}
    # In the order of the candidates, which decides between those that are alike.
    return auto.keep_best([tried[name] for name in candidates], folder)


def _tried(
    tasks: Runner, candidates: Mapping[str, Preset], folder: Path, on_step: noise_sqnr.OnStage
) -> Iterator[Tried]:
    folders = auto.folders_of(candidates, folder)
    first, preset = next(iter(candidates.items()))
    jobs = [
        # All recipes see the same calibration images, which the first one's folder has in the end anyway.
        [_candidate(_collect, first, preset, folders[first])],
        [_candidate(_try, name, preset, folders[name]) for name, preset in candidates.items()],
    ]
    on_step("calibrations", 0, len(candidates))
    finished = 0
    for group in jobs:
        for done in tasks.run(group):
            if done.failed:
                raise GaqError(f"The calibration with {done.task.name} failed: {_last_line(done)}")
            if done.result is not None:
                finished += 1
                on_step("calibrations", finished, len(candidates))
                yield done.result
        for run_folder in folders.values():
            auto.share(Run(folder=folders[first]), Run(folder=run_folder))


def _timed(preset: Preset) -> bool:
    mixed = preset.config.mixed
    return bool(mixed.budget) and mixed.unit is BudgetUnit.MILLISECONDS


def _candidate(function: Callable[..., Tried | None], name: str, preset: Preset, folder: Path) -> Task:
    files = [path.name for path in folder.glob("*")]
    return Task(name=name, function=function, arguments=(name, preset), folder=folder, files=files, log=_LOG)


def _last_line(done: Done) -> str:
    """Return where the output of a failed task is, and its last line, which is the error."""
    log = done.task.folder / done.task.log
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = next((line for line in reversed(lines) if line.strip()), "")
    return f"{said.strip()} (see {log})" if said else "its machine was lost, again and again."


def _collect(model: LoadedModel, folder: Path, name: str, preset: Preset) -> None:
    """Draw the calibration images of a candidate in its run folder."""
    model = _placed(model)
    seed, into = preset.config.seed, Run(folder=folder).calibration
    collect(model, model.spec.sampler, images=preset.images, seed=seed, folder=into)


def _try(model: LoadedModel, folder: Path, name: str, preset: Preset) -> Tried:
    """Calibrate a candidate in its run folder and measure the result."""
    model = _placed(model)
    tried = auto.measure(model, name, partial(calibrate, model, preset, folder=folder))
    judge(folder, model)  # here, since the machine that reads the plan may have no GPU
    return tried
