"""Many images in shards: the same bytes whoever draws them, however often it was killed, on one machine or on Ray."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engines import EngineFile
from gaq_export import pipeline
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor
from gaq_export.sampling import shards
from gaq_export.sampling.sample import Streamed

NUM, SHARD = 14, 3  # five files, the last of two images


def draw(engine: EngineFile, out: Path, **options: object) -> Streamed:
    return pipeline.sample_shards(engine.path, num=NUM, seed=5, batch=2, shard=SHARD, out=out, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def alone(tiny_step_engine: EngineFile, tmp_path_factory) -> Path:
    """What one worker draws."""
    out: Path = tmp_path_factory.mktemp("alone")
    made = draw(tiny_step_engine, out)
    assert made.drawn == NUM
    assert made.digest == shards.digest(out)
    return out


def test_shards_hold_the_images_of_their_seeds(tiny_step_engine: EngineFile, alone: Path, tmp_path: Path) -> None:
    read = list(shards.read_shards(alone))
    assert [len(images) for images, _ in read] == [3, 3, 3, 3, 2]
    assert torch.cat([seeds for _, seeds in read]).tolist() == list(range(5, 5 + NUM))
    drawn = pipeline.sample(tiny_step_engine.path, num=NUM, seed=5, batch=2, out=tmp_path)
    assert torch.equal(torch.cat([images for images, _ in read]), to_uint8_tensor(drawn.images))
    assert (alone / "grid.png").is_file()


def test_several_workers_draw_the_same_bytes(tiny_step_engine: EngineFile, alone: Path, tmp_path: Path) -> None:
    conditioning: list[tuple[int, int]] = []
    draw(tiny_step_engine, tmp_path, workers=3, on_images=lambda done, total: conditioning.append((done, total)))
    assert content(tmp_path) == content(alone)
    assert conditioning[0] == (0, NUM)
    assert conditioning[-1] == (NUM, NUM)
    assert [done for done, _ in conditioning] == sorted(done for done, _ in conditioning)


def test_a_drawing_that_is_killed_twice_goes_on_to_the_same_bytes(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    words = ["sample", "--engine", tiny_step_engine.path, "--num", NUM, "--seed", 5, "--batch", 2, "--shard", SHARD]
    command = [sys.executable, "-m", "gaq_export", *map(str, words), "--out", str(tmp_path), "-q", "--workers"]
    left = []
    for workers in (1, 2):
        before = len(content(tmp_path))
        process = subprocess.Popen([*command, f"{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(content(tmp_path)) == before:
            time.sleep(0.01)
        helpers = [Path(f"/proc/{child}") for child in _children(process.pid)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert workers == 1 or len(helpers) >= 2
        deadline = time.monotonic() + 60
        while any(map(_command, helpers)):  # those that it had started do not outlive it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left.append(5 - len(content(tmp_path)))
    assert left[0] > 0  # it was killed in the middle
    made = draw(tiny_step_engine, tmp_path)
    assert content(tmp_path) == content(alone)
    assert made.drawn == sum(len(images) for images, _ in list(shards.read_shards(alone))[5 - left[1] :])


def test_a_folder_takes_more_of_the_same_and_nothing_else(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    engine, options = tiny_step_engine.path, {"seed": 5, "batch": 2, "shard": SHARD, "out": tmp_path}
    pipeline.sample_shards(engine, num=6, **options)
    assert pipeline.sample_shards(engine, num=NUM, **options).drawn == NUM - 6
    assert content(tmp_path) == content(alone)
    assert pipeline.sample_shards(engine, num=NUM, **options).drawn == 0
    for changed, name in (({"seed": 6}, "seed"), ({"batch": 4}, "batch"), ({"shard": 7}, "shard")):
        with pytest.raises(GaqError, match=rf"holds other images \({name} differs\)"):
            pipeline.sample_shards(engine, num=NUM, **{**options, **changed})
    with pytest.raises(GaqError, match=r"holds other images \(num differs\)"):  # its last file would have to grow
        pipeline.sample_shards(engine, num=NUM + 1, **options)


def test_a_worker_that_dies_is_one_line_and_costs_nothing_already_drawn(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    def kill(done: int, total: int) -> None:
        if done:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(GaqError, match=r"A worker died.*The same command goes on"):
        draw(tiny_step_engine, tmp_path, workers=2, on_images=kill)
    assert 0 < len(content(tmp_path)) < 5
    draw(tiny_step_engine, tmp_path)
    assert content(tmp_path) == content(alone)


def test_numbers_below_one_and_other_batches_are_refused(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(GaqError, match="Found 0 workers; ask for 1 or more"):
        draw(tiny_step_engine, tmp_path, workers=0)
    with pytest.raises(GaqError, match="Found 99 images at a time; this engine takes 1 to 16"):
        pipeline.sample_shards(tiny_step_engine.path, num=1, batch=99, out=tmp_path)
    with pytest.raises(GaqError, match="this folder was not written by `sample`"):
        shards.digest(tmp_path)
    (tmp_path / "samples.json").write_bytes((alone / "samples.json").read_bytes())
    with pytest.raises(GaqError, match=r"shard-000000\.safetensors is missing: the same `sample` command"):
        shards.digest(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_on_ray_a_lost_actors_shard_is_drawn_elsewhere(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            actors = [p for p in Path("/proc").glob("[0-9]*") if b"ray::_Actor" in _command(p)]
            killed.append(int(actors[0].name))
            os.kill(killed[0], signal.SIGKILL)

    draw(tiny_step_engine, tmp_path, ray="local", on_images=kill)
    assert len(killed) == 1
    assert content(tmp_path) == content(alone)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # gone meanwhile
        return b""
