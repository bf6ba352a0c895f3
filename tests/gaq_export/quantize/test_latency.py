"""Milliseconds of a network by width: measured on a real engine, and cached, since no two measurements are the same."""

import json
from pathlib import Path

import pytest

import engines
from gaq_export import pipeline
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import latency
from gaq_export.quantize.presets import CalibrationOptions

LAYERS = ("unet.mid_block.resnets.0.conv1", "unet.mid_block.resnets.0.conv2")


def test_times_are_measured_once(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, widths = tmp_path / "times.json", (4, 32)
    clock = latency.StepClock(model=tiny_model, cache=cache, backend="openvino")
    monkeypatch.setattr(latency, "ROUNDS", 3)  # the numbers do not matter here
    first = clock(tiny_model.network, LAYERS, widths)
    assert first.keys() == {4, 32}
    assert all(0 < ms < 10_000 for ms in first.values())
    assert clock(tiny_model.network, LAYERS, widths) == first
    record = json.loads(cache.read_text())
    assert record["conditions"]["backend"] == "openvino"
    record["milliseconds"] = {"4": 1.0, "32": 2.0}  # believed, while the conditions are the same
    cache.write_text(json.dumps(record))
    assert clock(tiny_model.network, LAYERS, widths) == {4: 1.0, 32: 2.0}
    assert clock(tiny_model.network, LAYERS[:1], (32,)) != {32: 2.0}


def test_a_budget_of_milliseconds_makes_a_plan(tiny_model: LoadedModel, tmp_path: Path) -> None:
    chosen = pipeline.preset("tiny", CalibrationOptions(recipe="rtn", budget="100000ms"))
    times = tmp_path / "times.json"
    plan = pipeline.calibrate(
        tiny_model, pipeline.preset("tiny", CalibrationOptions(recipe="rtn")), folder=tmp_path / "first"
    )
    record = {
        "conditions": {
            "backend": engines.best_backend(),
            "batch": latency.BATCH,
            "widths": list(chosen.config.mixed.choices),
            "layers": list(plan.layers),
        },
        "milliseconds": {"4": 10.0, "8": 11.0, "32": 30.0},
    }
    times.write_text(json.dumps(record))
    mixed = pipeline.calibrate(
        tiny_model, pipeline.preset("tiny", CalibrationOptions(recipe="rtn", budget="15ms")), folder=tmp_path
    )
    widths = {layer.weight_bits for layer in mixed.layers.values()}
    assert widths <= {4, 8}
    assert len(mixed.layers) < len(plan.layers)  # there is time for some in float
