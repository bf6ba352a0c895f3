"""Who draws the calibration set: an engine where it is worth it, PyTorch elsewhere and where no engine can."""

import logging
from pathlib import Path

import pytest

from calib.data import CalibrationSet
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import float_engine
from gaq_export.quantize.float_engine import ENGINE_GROUP, GROUP, drawers
from gaq_export.quantize.trajectories import collect

SPEC = SamplerSpec(steps=2)


@pytest.fixture
def by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an engine worth it for any model, on any processor."""
    monkeypatch.setattr(float_engine, "LARGE", 0.0)
    monkeypatch.setattr(float_engine, "cpu_features", lambda: (float_engine.FEATURE,))


def collected(model: LoadedModel, folder: Path | None = None) -> CalibrationSet:
    return collect(model, SPEC, images=3, folder=folder)


def test_a_small_model_is_drawn_by_pytorch(tiny_model: LoadedModel) -> None:
    assert [drawer.group for drawer in drawers(tiny_model, SPEC)] == [GROUP]


def test_an_engine_draws_nearly_the_same_images_and_they_are_read_again(
    by_engine: None, tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = collected(tiny_model, tmp_path)
    plain = collect(tiny_model, SPEC, images=3, by_engine=False)
    assert 0 < float((drawn.x - plain.x).abs().max()) < 0.1  # products of bfloat16
    assert [drawer.group for drawer in drawers(tiny_model, SPEC)] == [ENGINE_GROUP, GROUP]
    monkeypatch.setattr(float_engine, "export_float", lambda *_: pytest.fail("exported though all is there"))
    assert bool((collected(tiny_model, tmp_path).x == drawn.x).all())


def test_where_no_engine_can_be_built_pytorch_draws(
    by_engine: None, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise GaqError("torch cannot export this network to ONNX.")

    monkeypatch.setattr(float_engine, "export_float", refuse)
    with caplog.at_level(logging.WARNING):
        drawn = collected(tiny_model)
    assert bool((drawn.x == collect(tiny_model, SPEC, images=3, by_engine=False).x).all())
    assert "cannot export" in caplog.text
