"""Building an engine: what its record says, what its audit counts, and that a failed check replaces no file."""

import importlib.util
import shutil
from pathlib import Path

import pytest

import engines
from calib.plan import load_plan
from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.deploy import verify
from gaq_export.deploy.parity import Tolerance
from gaq_export.deploy.record import record_of
from gaq_export.errors import GaqError

IMPOSSIBLE = dict.fromkeys(("openvino", "ort-cpu"), Tolerance(floor_db=300.0, margin_db=-300.0))


def test_an_engine_knows_its_model_its_bits_and_its_layers(tiny_engine, tiny_run: Path, tiny_model) -> None:
    plan = load_plan(tiny_run / "plan.safetensors")
    assert record_of(tiny_engine).provenance.fingerprint == tiny_model.fingerprint
    assert record_of(tiny_engine).bits == "W4A8"
    assert record_of(tiny_engine).plan.layers == len(plan.layers)
    counts = tiny_engine.audit.counts
    weighted = len(plan.layers) + len(plan.float_layers)
    assert sum(counts.values()) == weighted
    assert counts["convolution", "int8"] == sum(q.codes.ndim == 4 for q in plan.layers.values())
    assert tiny_engine.audit.weight_bytes["int4"] == sum((q.codes.numel() + 1) // 2 for q in plan.layers.values())
    assert [p.name for p in tiny_engine.path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_tensorrt_rtx_runs_every_quantized_layer_in_int8_and_keeps_int4(
    tiny_run: Path, tiny_model, tmp_path: Path
) -> None:
    config = EngineConfig(backend="tensorrt-rtx")
    built = pipeline.build_engine(folder=tiny_run, out=tmp_path / "unet.plan", config=config, model=tiny_model)
    convolutions = sum(q.codes.ndim == 4 for q in built.plan.layers.values())
    assert built.file.audit.counts["convolution", "int8"] == convolutions
    assert built.file.audit.weight_bytes["int4"] > 0
    if engines.find_backend("tensorrt-rtx").can_run() is None:
        assert built.parity is not None
    else:
        assert built.parity is None
        assert built.not_run


def test_an_engine_that_fails_its_check_replaces_nothing(
    tiny_run: Path, tiny_model, tiny_engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unet.plan", "unet.plan.json"):
        shutil.copy(tiny_engine.path.with_name(name), tmp_path / name)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(verify, "TOLERANCES", IMPOSSIBLE)
    config = EngineConfig(backend="openvino", threads=1)
    with pytest.raises(GaqError, match=r"The openvino engine differs .* at least 300.0 dB expected. Nothing was"):
        pipeline.build_engine(folder=tiny_run, out=tmp_path / "unet.plan", config=config, model=tiny_model)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
