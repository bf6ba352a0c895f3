"""Damaged files end in one line or in the right result: a small round of `benchmarks/fuzz.py`, and its mutations."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mutations

ROOT = Path(__file__).resolve().parents[2]
TREE = {"format": 1, "layers": {"first": {"bits": 4, "zero": [0, 1]}}, "names": ["a", "b", "c"]}


def test_no_damaged_file_ends_in_a_traceback_a_hang_or_another_result() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--variants", "120", "--seed", "7"]

    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)

    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_tree_is_another_tree(seed: int) -> None:
    text, how = mutations.changed_tree(json.loads(json.dumps(TREE)), Random(seed))

    assert how
    assert len(text) > mutations.DEPTH or json.dumps(json.loads(text)) != json.dumps(TREE), how


@pytest.mark.parametrize("seed", range(20))
def test_the_same_seed_does_the_same_damage(seed: int, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "other")]
    for file in files:
        file.write_bytes(bytes(range(200)))
    assert len({mutations.bytes_of(file, Random(seed)) for file in files}) == 1
    assert files[0].is_dir() or not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


def test_tensors_and_arrays_are_damaged_in_many_ways(tmp_path: Path) -> None:
    ways = set()
    for seed in range(60):
        save_file({"a": torch.ones(3, 4), "b": torch.zeros(2)}, tmp_path / "x.safetensors", {"key": "value"})
        np.savez(tmp_path / "x.npz", train_images=np.zeros((2, 4, 4, 1), np.uint8))
        ways.add(mutations.tensors_of(tmp_path / "x.safetensors", Random(seed)).partition(": ")[2])
        ways.add(mutations.arrays_of(tmp_path / "x.npz", Random(seed)))
    assert len(ways) > 15
