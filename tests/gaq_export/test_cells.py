"""The machinery of the calibration benchmarks on a tiny network: one calibration serves all activation bits."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import calibration
import omega_scan
from calib.affine import quantize_weight
from calib.config import OMEGA_RULES
from calib.plan import QuantPlan, save_plan
from calib.progress import Progress
from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.results import table_at
from gaq_export.comparison.spec import Cell, Comparison, claim, parse_bits, schedule
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel, wrap

RUNGS = ("rtn", "gptq", "uniform", "gac")


@pytest.fixture
def model(make_foreign, tiny_schedule) -> LoadedModel:
    return wrap(make_foreign(), shape=(1, 8, 8), schedule=tiny_schedule, sampler=SamplerSpec(steps=4))


def bench_of(model: LoadedModel, folder: Path, images: int = 2, draw: str = "pytorch") -> Comparison:
    yardstick = Yardstick(model=model, folder=folder, images=images, draw=draw, data=None, classifier=None)
    rows = {name: calibration.rung(name) for name in RUNGS}
    bits = ((4, 8), (4, 4))
    return Comparison(
        yardstick=yardstick,
        schedule=schedule("tiny", 3),
        rows=rows,
        bits=bits,
        seeds=(0,),
        workers=1,
        weights_alone=True,
    )


def saved(plan: QuantPlan, folder: Path) -> bytes:
    save_plan(plan, folder / "plan.safetensors")
    return (folder / "plan.safetensors").read_bytes() + (folder / "plan.json").read_bytes()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_plan_at_other_activation_bits_is_what_calibrating_at_them_gives(rung, model, tmp_path: Path) -> None:
    b = bench_of(model, tmp_path)
    config, data = b.config(Cell(row=rung, seed=1, wbits=4)), runner._collected(b, 1)
    runner.plan_at(model, data, config, 8, tmp_path / "blocks")
    seen: list[Progress] = []
    derived = runner.plan_at(model, data, config, 4, tmp_path / "blocks", seen.append)
    assert all(p.resumed for p in seen if p.result is not None)
    assert saved(derived, tmp_path) == saved(runner.plan_at(model, data, config, 4, tmp_path / "fresh"), tmp_path)


def test_rounding_to_nearest_learns_nothing_and_searches_nothing(model, tmp_path: Path) -> None:
    b = bench_of(model, tmp_path)
    plan = runner.plan_at(
        model, runner._collected(b, 0), b.config(Cell(row="rtn", seed=0, wbits=4)), 8, tmp_path / "blocks"
    )
    for name, layer in plan.layers.items():
        weight = model.network.get_submodule(name).weight.detach()
        widest = weight.flatten(1).abs().amax(1) / 7
        assert layer.weight_scale.tolist() == pytest.approx(widest.tolist())
        assert torch.equal(layer.codes, quantize_weight(weight, layer.weight_scale, 4))


def test_gptq_alone_rounds_some_weights_another_way_than_to_nearest(model, tmp_path: Path) -> None:
    b = bench_of(model, tmp_path)
    plan = runner.plan_at(
        model, runner._collected(b, 0), b.config(Cell(row="gptq", seed=0, wbits=4)), 8, tmp_path / "blocks"
    )
    nearest = {
        name: quantize_weight(model.network.get_submodule(name).weight, q.weight_scale, 4)
        for name, q in plan.layers.items()
    }
    assert any(not torch.equal(q.codes, nearest[name]) for name, q in plan.layers.items())


def test_every_omega_rule_is_a_rung_that_says_what_it_is() -> None:
    assert set(OMEGA_RULES) <= set(calibration.MEANING)


@pytest.fixture
def measured(model, tmp_path: Path) -> Comparison:
    """A bench of which everything but one cell was measured."""
    b = bench_of(model, tmp_path / "bench")
    claim(b)
    for job in (runner.PREPARE, *(cell.name for cell in b.cells[:-1])):
        runner.work(b, job)
    return b


def test_a_page_shows_every_row_and_says_what_is_missing(measured: Comparison, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/elsewhere/calibration.py", "--folder", "/a/b/bench", "--report-only"])
    calibration.write_page(measured, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "    python benchmarks/calibration.py --folder bench\n" in text
    assert text.count("\n| `rtn` |") == text.count("\n| `uniform` |") == 2
    assert "Not measured: gac-w4-seed0." in text
    assert "![SQNR at every step](page.svg)" in text
    assert (tmp_path / "page.svg").read_text(encoding="utf-8").count("uniform") >= 2
    runner.work(measured, "gac-w4-seed0")
    calibration.write_page(measured, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Not measured" not in text
    assert "the goal of 50 %" in text


def test_what_was_measured_is_not_measured_again_and_other_bits_are_added(measured: Comparison) -> None:
    cell = measured.cells[0]
    before = runner.result(measured, cell)
    more = dataclasses.replace(measured, bits=((4, 8), (4, 4), (4, 6)))
    assert cell in runner.missing(more)
    assert cell not in runner.missing(measured)
    runner.work(more, cell.name)
    after = runner.result(more, cell)
    assert list(after["activations"]) == ["8", "4", "6"]
    assert {k: v for k, v in after.items() if k != "activations"} == {
        k: v for k, v in before.items() if k != "activations"
    }
    assert after["activations"]["8"] == before["activations"]["8"]


def test_fewer_activation_bits_and_nothing_learned_are_further_from_float(measured: Comparison) -> None:
    a8, a4 = (table_at(measured, 4, abits) for abits in (8, 4))
    for row in ("rtn", "uniform"):
        assert a8[row][0].mean_db > a4[row][0].mean_db + 3
        assert a8[row][0].weights_db == a4[row][0].weights_db > a8[row][0].mean_db
    assert a8["uniform"][0].spread == 0


def test_a_folder_of_other_measurements_is_refused(measured: Comparison) -> None:
    claim(dataclasses.replace(measured, seeds=(0, 1), bits=((8, 8),)))
    other = dataclasses.replace(measured.yardstick, images=3)
    with pytest.raises(GaqError, match=r"holds results with other settings \(images\)\. Give another --folder"):
        claim(dataclasses.replace(measured, yardstick=other))


def test_a_folder_without_results_gives_no_page(model, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="holds no results yet"):
        calibration.write_page(bench_of(model, tmp_path), tmp_path / "page.md")


def test_the_engine_draws_what_pytorch_draws(model, tmp_path: Path) -> None:
    b = bench_of(model, tmp_path, draw="engine")
    runner.work(b, runner.PREPARE)
    plan = runner.plan_at(
        model, runner._collected(b, 0), b.config(Cell(row="uniform", seed=0, wbits=4)), 4, tmp_path / "blocks"
    )
    plain = dataclasses.replace(b.yardstick, draw="pytorch")
    with yardstick.quantized(b.yardstick, plan) as engine, yardstick.quantized(plain, plan) as fake:
        drawn, expected = (yardstick.pictures(b.yardstick, network) for network in (engine, fake))
    unquantized = yardstick.pictures(b.yardstick, model.network)
    assert float(psnr(drawn, expected).min()) > float(psnr(drawn, unquantized).max()) + 10


def test_a_variant_changes_only_what_it_names(model, tmp_path: Path) -> None:
    base = schedule("tiny", None).config
    changed = omega_scan.changed({"meta_learning_rate": 0.1})(base)
    assert changed == dataclasses.replace(base, omega=dataclasses.replace(base.omega, meta_learning_rate=0.1))


@pytest.mark.parametrize("name", [name for name, _ in omega_scan.VARIANTS])
def test_every_variant_is_a_valid_config(name: str) -> None:
    row = omega_scan.chosen(name)[name]
    assert row(schedule("tiny", None).config).omega is not None


def test_bits_are_read_in_any_case_and_refused_in_any_other_form() -> None:
    assert parse_bits("w4a8,W8A8") == ((4, 8), (8, 8))
    with pytest.raises(GaqError, match="write them as W4A8"):
        parse_bits("4/8")
    with pytest.raises(GaqError, match="between 2 and 8"):
        parse_bits("W4A16")
