"""Milliseconds of a network by width: measured on a real engine, and cached, since no two measurements are the same."""

import json
from pathlib import Path

import pytest

import engines
from calib.records import signed
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
    del record["record_sha256"]
    cache.write_bytes(signed(record))
    assert clock(tiny_model.network, LAYERS, widths) == {4: 1.0, 32: 2.0}
    assert clock(tiny_model.network, LAYERS[:1], (32,)) != {32: 2.0}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"conditions": {}, "milliseconds": {"4": 1, "32": 2}}', "[" * 100_000, '{"milliseconds": "x"}']
)
def test_damaged_times_are_measured_again_and_the_log_says_so(
    text: str,
    tiny_model: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(latency, "_median_ms", lambda calls: dict.fromkeys(calls, 5.0))
    monkeypatch.setattr(latency, "_build", lambda *job: None)
    monkeypatch.setattr(latency, "_call", lambda *job: None)
    cache = tmp_path / "times.json"
    cache.write_text(text)
    clock = latency.StepClock(model=tiny_model, cache=cache, backend="openvino")
    assert clock(tiny_model.network, LAYERS, (4, 32)) == {4: 5.0, 32: 5.0}
    assert "times.json is damaged, altered or of another version: it is made again." in caplog.text


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
    times.write_bytes(signed(record))
    mixed = pipeline.calibrate(
        tiny_model, pipeline.preset("tiny", CalibrationOptions(recipe="rtn", budget="15ms")), folder=tmp_path
    )
    widths = {layer.weight_bits for layer in mixed.layers.values()}
    assert widths <= {4, 8}
    assert len(mixed.layers) < len(plan.layers)  # there is time for some in float
