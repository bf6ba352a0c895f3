"""Several processes, or actors on Ray, draw the bytes that one process draws, also when some of them die."""

import importlib.util
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from engines import EngineFile
from gaq_export.errors import GaqError
from tests.gaq_export.sampling.drawing import NUM, command_line, content, draw


def test_several_workers_draw_the_same_bytes(tiny_step_engine: EngineFile, alone: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    draw(tiny_step_engine, tmp_path, workers=3, on_images=lambda done, total: calls.append((done, total)))
    assert content(tmp_path) == content(alone)
    assert calls[0] == (0, NUM)
    assert calls[-1] == (NUM, NUM)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


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


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_on_ray_a_lost_actors_shard_is_drawn_elsewhere(
    tiny_step_engine: EngineFile, alone: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            actors = [p for p in Path("/proc").glob("[0-9]*") if b"ray::_Actor" in command_line(p)]
            killed.append(int(actors[0].name))
            os.kill(killed[0], signal.SIGKILL)

    draw(tiny_step_engine, tmp_path, ray="local", on_images=kill)
    assert len(killed) == 1
    assert content(tmp_path) == content(alone)
