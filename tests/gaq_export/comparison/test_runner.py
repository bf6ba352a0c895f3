"""Cells are measured once, each for all activation bits, and a page can be written from those that are there."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calib.affine import quantize_weight
from calib.plan import QuantPlan, save_plan
from calib.progress import Progress
from calib.records import signed
from gaq_export.comparison import runner
from gaq_export.comparison.spec import Cell, Comparison
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.make_plan import CalibrationCallbacks, make_plan
from tests.gaq_export.comparison.conftest import RUNGS, comparison_of


def saved(plan: QuantPlan, folder: Path) -> bytes:
    save_plan(plan, folder / "plan.safetensors")
    return (folder / "plan.safetensors").read_bytes() + (folder / "plan.json").read_bytes()


def plan_of(row: str, model: LoadedModel, folder: Path) -> QuantPlan:
    comparison = comparison_of(model, folder)
    config = comparison.config(Cell(row=row, seed=0, wbits=4))
    data = runner._calibration_set(comparison, 0)
    return make_plan(model, data, runner.at_width(config, 8), folder / "blocks")


@pytest.mark.parametrize("rung", RUNGS)
def test_a_plan_at_other_activation_bits_is_what_calibrating_at_them_gives(rung, model, tmp_path: Path) -> None:
    comparison = comparison_of(model, tmp_path)
    config, data = comparison.config(Cell(row=rung, seed=1, wbits=4)), runner._calibration_set(comparison, 1)
    make_plan(model, data, runner.at_width(config, 8), tmp_path / "blocks")
    seen: list[Progress] = []
    callbacks = CalibrationCallbacks(on_progress=seen.append)
    derived = make_plan(model, data, runner.at_width(config, 4), tmp_path / "blocks", callbacks)
    assert all(p.resumed for p in seen if p.result is not None)
    assert saved(derived, tmp_path) == saved(
        make_plan(model, data, runner.at_width(config, 4), tmp_path / "fresh"), tmp_path
    )


def test_rounding_to_nearest_learns_nothing_and_searches_nothing(model, tmp_path: Path) -> None:
    for name, layer in plan_of("rtn", model, tmp_path).layers.items():
        weight = model.network.get_submodule(name).weight.detach()
        widest = weight.flatten(1).abs().amax(1) / 7
        assert layer.weight_scale.tolist() == pytest.approx(widest.tolist())
        assert torch.equal(layer.codes, quantize_weight(weight, layer.weight_scale, 4))


def test_gptq_alone_rounds_some_weights_another_way_than_to_nearest(model, tmp_path: Path) -> None:
    plan = plan_of("gptq", model, tmp_path)
    nearest = {
        name: quantize_weight(model.network.get_submodule(name).weight, q.weight_scale, 4)
        for name, q in plan.layers.items()
    }
    assert any(not torch.equal(q.codes, nearest[name]) for name, q in plan.layers.items())


def test_what_was_measured_is_not_measured_again_and_other_bits_are_added(measured: Comparison) -> None:
    cell = measured.cells[0]
    before = runner.read_cell(measured, cell)
    more = dataclasses.replace(measured, bits=((4, 8), (4, 4), (4, 6)))
    assert cell in runner.missing(more)
    assert cell not in runner.missing(measured)
    runner.work(more, cell.name)
    after = runner.read_cell(more, cell)
    assert list(after.activations) == ["8", "4", "6"]
    assert dataclasses.replace(after, activations=before.activations) == before
    assert after.activations["8"] == before.activations["8"]


@pytest.mark.parametrize("suffix", [".json", "-a8.safetensors"])
def test_a_cell_with_a_flipped_byte_is_measured_again_and_the_log_says_so(
    suffix: str, measured: Comparison, caplog: pytest.LogCaptureFixture
) -> None:
    cell = measured.cells[1]
    path = measured.path(cell, suffix)
    whole = path.read_bytes()
    assert cell not in runner.missing(measured)
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cell in runner.missing(measured)
        assert f"{path.name} is damaged, altered or of another version: it is made again." in caplog.text
    path.write_bytes(whole)
    assert cell not in runner.missing(measured)


def test_a_clock_adds_what_an_interrupted_process_took(tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_bytes(signed({"seconds": 100.0, "peak_mib": 1e9}))
    read = runner.Clock(tmp_path / "clock.json").read()
    assert 100 <= read.seconds < 110
    assert read.peak_mib == 1e9


def test_a_clock_without_a_count_of_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "peak_memory_mib", lambda: None)
    assert runner.Clock(tmp_path / "clock.json").read().peak_mib is None


def test_the_module_starts_where_the_system_has_no_resource_module() -> None:
    code = "import sys; sys.modules['resource'] = None; import gaq_export.comparison.runner"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_page_is_written_if_that_is_what_was_asked_for(measured: Comparison) -> None:
    done: list[str] = []
    runner.execute(measured, None, True, lambda: done.append("page"), done.append)
    assert done == ["page"]
