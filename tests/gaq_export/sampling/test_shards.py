"""Many images in shards: the images of their seeds, and the same bytes however often the run was killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calib.errors import CalibError
from calib.files import read_safetensors, write_checked
from calib.records import signed
from engines import EngineFile
from gaq_export import pipeline
from gaq_export.errors import GaqError
from gaq_export.images import to_uint8_tensor
from gaq_export.sampling import shards
from tests.gaq_export.commands import gaq, refused
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
    with pytest.raises(CalibError, match=r"Cannot read .*samples\.json: .*Give a folder that `sample` wrote"):
        shards.digest(tmp_path)
    (tmp_path / "samples.json").write_bytes((alone / "samples.json").read_bytes())
    with pytest.raises(GaqError, match=r"shard-000000\.safetensors is missing: the same `sample` command"):
        shards.digest(tmp_path)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


def fewer(file: Path) -> None:
    tensors = read_safetensors(file)[1]
    write_checked(file, {name: tensor[:2] for name, tensor in tensors.items()})


def other_seeds(file: Path) -> None:
    tensors = read_safetensors(file)[1]
    write_checked(file, tensors | {"seeds": tensors["seeds"] + 1})


def floats(file: Path) -> None:
    tensors = read_safetensors(file)[1]
    write_checked(file, tensors | {"images": tensors["images"].float()})


def smaller(file: Path) -> None:
    tensors = read_safetensors(file)[1]
    write_checked(file, tensors | {"images": tensors["images"][..., :8]})


def no_tensors(file: Path) -> None:
    write_checked(file, {})


def no_file(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flipped, fewer, other_seeds, floats, smaller, no_tensors, no_file])
def test_a_shard_that_does_not_verify_is_refused_by_evaluate_and_drawn_again_by_sample(
    spoil: Callable[[Path], None],
    tiny_step_engine: EngineFile,
    alone: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = shutil.copytree(alone, tmp_path / "s")
    spoilt = shards.shard_path(out, 1)
    spoil(spoilt)
    line = refused(tmp_path, "evaluate", out, alone, "--features", "digits", "--out", tmp_path / "e", "-q")
    assert spoilt.name in line
    words = ("--num", NUM, "--seed", 5, "--batch", 2, "--shard", SHARD, "--out", out, "--workers", 1, "-q")
    drawn = gaq("sample", "--engine", tiny_step_engine.path, *words)
    assert drawn.exit_code == 0, drawn.output
    assert f"{SHARD} of {NUM} images" in drawn.stdout
    assert content(out) == content(alone)
    assert f"{spoilt} is damaged, altered or of another version: it is made again." in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"num": 10**12},
        {"num": -1},
        {"num": "14"},
        {"num": None},
        {"shard": 0},
        {"shard": -2},
        {"seed": 2**64},
        {"batch": []},
        {"identity": 3},
        {"colour": 1},
    ],
)
def test_a_request_of_another_form_is_one_line(changes: dict[str, object], alone: Path, tmp_path: Path) -> None:
    out = shutil.copytree(alone, tmp_path / "s")
    record = json.loads((out / "samples.json").read_text())
    del record["record_sha256"]
    for text in (signed(record | changes), b"[" * 100_000, b"[]"):
        (out / "samples.json").write_bytes(text)
        line = refused(tmp_path, "evaluate", out, alone, "--features", "digits", "--out", tmp_path / "e", "-q")
        assert "samples.json" in line


def test_an_edited_request_is_refused(alone: Path, tmp_path: Path) -> None:
    out = shutil.copytree(alone, tmp_path / "s")
    record = (out / "samples.json").read_text()
    (out / "samples.json").write_text(record.replace('"backend": "openvino"', '"backend": "tensorrt"'))

    line = refused(tmp_path, "evaluate", out, alone, "--features", "digits", "--out", tmp_path / "e", "-q")

    assert "samples.json was edited since it was written (its checksum differs)." in line


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
