"""Many images in shards: the images of their seeds, and the same bytes however often the run was killed."""

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
from tests.gaq_export.sampling.drawing import NUM, SHARD, command_line, content, draw


def test_shards_hold_the_images_of_their_seeds(tiny_step_engine: EngineFile, alone: Path, tmp_path: Path) -> None:
    read = list(shards.read_shards(alone))
    assert [len(images) for images, _ in read] == [3, 3, 3, 3, 2]
    assert torch.cat([seeds for _, seeds in read]).tolist() == list(range(5, 5 + NUM))
    drawn = pipeline.sample(tiny_step_engine.path, num=NUM, seed=5, batch=2, out=tmp_path)
    assert torch.equal(torch.cat([images for images, _ in read]), to_uint8_tensor(drawn.images))
    assert (alone / "grid.png").is_file()


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
        while any(map(command_line, helpers)):  # those that it had started do not outlive it
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


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
