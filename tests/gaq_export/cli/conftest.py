"""What tests of commands may spoil: copies of the tiny model, its run and its engine."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def home_copy(home: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(home, tmp_path / "tiny")


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def engine_copy(tiny_engine, tmp_path: Path) -> Path:
    """A copy of the engine that a test may spoil."""
    for name in ("unet.plan", "unet.plan.json"):
        shutil.copy(tiny_engine.path.with_name(name), tmp_path / name)
    return tmp_path / "unet.plan"


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A regular file, below which no user can write."""
    path = tmp_path / "file"
    path.write_text("in the way")
    return path
