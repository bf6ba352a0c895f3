"""What is advised where an engine differs from PyTorch."""

from dataclasses import replace
from pathlib import Path

import pytest

from calib.plan import load_plan
from gaq_export.deploy import verify


def test_narrower_weights_are_advised_where_sums_overflow(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(tiny_run / "plan.safetensors")
    wide = replace(plan, layers={name: replace(layer, weight_bits=8) for name, layer in plan.layers.items()})
    for overflow, found, words in ((True, wide, "give --wbits 7"), (True, plan, "another"), (False, wide, "another")):
        monkeypatch.setattr(verify, "int8_sums_overflow", lambda overflow=overflow: overflow)
        assert words in verify._advice("openvino", found)
    assert "another" in verify._advice("tensorrt", wide)
