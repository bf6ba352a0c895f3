"""`--recipe auto` keeps the best of several recipes, says why, and finds them all finished the second time."""

import json
from pathlib import Path

import pytest

from calib.plan import load_plan
from gaq_export.comparison import auto
from gaq_export.comparison.auto import Tried, explain
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import noise_sqnr
from tests.gaq_export.commands import gaq


def test_the_best_is_kept_and_the_others_are_there(
    home: Path, tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "CANDIDATES", ("rtn", "adaround"))
    monkeypatch.setattr(auto, "IMAGES", 2)
    words = ("calibrate", "--weights", home, "--recipe", "auto", "--abits", 8, "--run", tmp_path / "run", "--quiet")
    result = gaq(*words)
    assert result.exit_code == 0, result.output
    journal = json.loads((tmp_path / "run" / "run.json").read_text())["journal"]
    tried = next(line for line in journal if line["step"] == "auto")["tried"]
    best = max(tried, key=tried.get)
    plan = load_plan(tmp_path / "run" / "plan.safetensors")
    assert plan.config == load_plan(tmp_path / "run" / "auto" / best / "plan.safetensors").config
    values = {
        name: noise_sqnr.of_plan(
            tiny_model, load_plan(tmp_path / "run" / "auto" / name / "plan.safetensors"), 2, lambda *progress: None
        ).both.mean()
        for name in tried
    }
    assert {name: round(float(value), 2) for name, value in values.items()} == tried
    assert result.stdout.startswith(f"{best}: {tried[best]:.1f} dB SQNR")
    stamp = (tmp_path / "run" / "auto" / "rtn" / "plan.safetensors").stat().st_mtime_ns
    assert gaq(*words).exit_code == 0
    assert (tmp_path / "run" / "auto" / "rtn" / "plan.safetensors").stat().st_mtime_ns == stamp


def test_the_reason_names_the_lead() -> None:
    tried = [
        Tried(recipe="a", mean_db=38.25, worst_db=20.0, seconds=1.0),
        Tried(recipe="b", mean_db=37.0, worst_db=19.0, seconds=1.0),
    ]
    assert explain(tried).startswith("a: 38.2 dB")
    assert "(20.0 at the worst), 1.2 ahead of the next; b 37.0" in explain(tried)
