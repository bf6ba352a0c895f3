"""What is particular to OpenVINO: a batch cut in parts, float types, and its long error messages."""

import importlib.util

import numpy as np
import pytest

from engines import EngineConfig, build, open_engine, openvino_cpu


@pytest.mark.parametrize(("batch", "threads", "parts"), [(4, 2, 2), (4, 4, 4), (3, 2, 1), (6, 4, 2), (1, 8, 1)])
def test_a_batch_is_cut_into_equal_parts(batch: int, threads: int, parts: int) -> None:
    assert openvino_cpu._streams(batch, threads) == parts


def test_parts_of_a_batch_compute_what_the_whole_does(tiny_onnx, feeds, tmp_path) -> None:
    outputs = []
    for threads in (1, 2, 4):
        file = build(tiny_onnx("int8"), tmp_path / f"{threads}.plan", EngineConfig(backend="openvino", threads=threads))
        with open_engine(file) as engine:
            outputs.append(engine(feeds(4))["eps"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-5)


def test_weights_are_counted_as_stored_and_the_note_says_what_they_become(tiny_onnx, tmp_path) -> None:
    audit = build(tiny_onnx("int4cast"), tmp_path / "unet.plan", EngineConfig(backend="openvino")).audit
    assert audit.weight_bytes["int4"] == (16 * 16 * 9 + 16 * 16) // 2
    assert "expands INT4 to INT8" in audit.note
    assert f"i8 {16 * 16 * 9 + 16 * 16}" in audit.note


def test_of_a_long_message_the_cause_is_left() -> None:
    error = RuntimeError(
        "Exception from src/inference/core.cpp:109:\nCheck 'model' failed at src/frontends/onnx.cpp:12:\n"
        "FrontEnd API failed with OpConversionFailure:\nNo conversion for Example\n"
    )
    assert openvino_cpu._reason(error) == "No conversion for Example"


def test_an_absent_openvino_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert openvino_cpu.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert openvino_cpu.missing() == "OpenVINO is not installed: pip install openvino"
