"""On a Ray cluster the cells of a comparison, and the candidates of `--recipe auto`, give the bytes they give here."""

import importlib.util
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from calib.files import read_safetensors, tensors_digest
from gaq_export.cluster.connection import Cluster, connected
from gaq_export.cluster.tasks import Done, Task
from gaq_export.comparison import auto, on_cluster, runner
from gaq_export.comparison.runner import CellRecord
from gaq_export.comparison.spec import Comparison, adjusted_preset, recipe_rows
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.calibrate import calibrate
from gaq_export.quantize.recipes import RECIPES
from gaq_export.quantize.verdict import judge
from tests.gaq_export.sampling.drawing import command_line

PRESET = replace(adjusted_preset("tiny", 2), images=2)


def comparison(model: LoadedModel, folder: Path) -> Comparison:
    return Comparison(
        yardstick=Yardstick(model=model, folder=folder, images=2, computed_by=ComputedBy.PYTORCH),
        preset=PRESET,
        rows=recipe_rows(["adaround"]),
        bits=((4, 8),),
        seeds=(0,),
        workers=1,
    )


def numbers(measured: Comparison) -> list[CellRecord]:
    """Return what the cells have measured, apart from time, memory and how many ran at a time."""
    records = [runner.read_cell(measured, cell) for cell in measured.cells]
    return [replace(record, seconds=0.0, peak_mib=None, workers=1) for record in records if record is not None]


def stored(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """Return header and digest of each file; the order in which safetensors writes a header is another every time."""
    files = {path.relative_to(folder).as_posix(): read_safetensors(path) for path in folder.rglob("*.safetensors")}
    return {name: (header, tensors_digest(tensors)) for name, (header, tensors) in files.items()}


def kill_first(mark: Path, killed: list[int]) -> None:
    """Kill the worker of the first task that sends something."""
    while not mark.exists():
        time.sleep(0.01)
    workers = [p for p in Path("/proc").glob("[0-9]*") if command_line(p).startswith(b"ray::do")]
    killed += [int(path.name) for path in workers]
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_on_ray_a_cell_gives_the_same_bytes_also_when_its_worker_dies(tiny_model: LoadedModel, tmp_path: Path) -> None:
    model = tiny_model.with_sampler(SamplerSpec(steps=2))
    here, there = (comparison(model, tmp_path / name) for name in ("here", "there"))
    for job in (runner.PREPARE, here.cells[0].name):
        runner.work(here, job)
    said: list[str] = []
    killed: list[int] = []
    threading.Thread(target=kill_first, args=(tmp_path / "there/logs/adaround-w4-seed0.log", killed)).start()
    with connected("local") as cluster:
        assert on_cluster.run(there, said.append, cluster) == []
    assert len(killed) == 1
    assert said == ["prepare: done", "adaround-w4-seed0: done"]
    assert runner.missing(there) == []
    assert numbers(here) == numbers(there)
    assert stored(here.yardstick.folder) == stored(there.yardstick.folder)


class Here:
    """Does tasks one after another in this process, in folders of their own, as `Tasks` has them done elsewhere."""

    def __init__(self, shared: object, scratch: Path) -> None:
        self._shared, self._scratch = shared, scratch

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for number, task in reversed(list(enumerate(tasks))):
            folder = self._scratch / f"{number}-{task.name}"
            for file in task.files:
                copy = shutil.copytree if (task.folder / file).is_dir() else shutil.copy
                copy(task.folder / file, folder / file)
            folder.mkdir(parents=True, exist_ok=True)
            result = task.function(self._shared, folder, *task.arguments)
            shutil.copytree(folder, task.folder, dirs_exist_ok=True)
            shutil.rmtree(folder)
            yield Done(task=task, failed=False, result=result)


def test_candidates_of_auto_are_the_same_in_whatever_order_and_folder_they_are_done(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "IMAGES", 2)
    model = tiny_model.with_sampler(SamplerSpec(steps=2))
    candidates = {name: replace(PRESET, config=RECIPES[name].apply(PRESET.config)) for name in ("rtn", "adaround")}
    serial = auto.choose(model, candidates, tmp_path / "serial", partial(calibrate, model))
    scattered = on_cluster.choose_with(Here(model, tmp_path / "scratch"), candidates, tmp_path / "scattered")
    assert [replace(tried, seconds=0.0) for tried in serial] == [replace(tried, seconds=0.0) for tried in scattered]
    judge(tmp_path / "serial", model)
    judge(tmp_path / "scattered", None)  # recorded already, where the plan was made
    for name in ("plan.safetensors", "plan.json", "verdict.json"):
        assert (tmp_path / "serial" / name).read_bytes() == (tmp_path / "scattered" / name).read_bytes()
    assert stored(tmp_path / "serial") == stored(tmp_path / "scattered")


@pytest.mark.parametrize(
    ("name", "gpus", "place"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0")],
)
def test_a_cell_computes_on_a_gpu_where_the_cluster_has_some(name: str, gpus: int, place: str) -> None:
    assert str(on_cluster.find_place(name, Cluster(ray=None, address="local", cpus=4, gpus=gpus)).place) == place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "Found --device cuda, but the Ray cluster at 'local' has no GPU; use --device cpu."),
        ("cuda:1", "Found --device cuda:1 with --ray; give auto, cpu or cuda: Ray decides which GPU a cell gets."),
    ],
)
def test_a_device_that_a_cell_cannot_have_is_one_line(name: str, message: str) -> None:
    with pytest.raises(GaqError, match=re.escape(message)):
        on_cluster.find_place(name, Cluster(ray=None, address="local", cpus=4, gpus=0))
