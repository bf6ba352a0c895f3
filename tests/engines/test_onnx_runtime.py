"""What ONNX Runtime alone is asked: which device, how far to optimise, and what is missing."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines import EngineConfig, EngineError, build, onnx_runtime, open_engine
from engines.graph import read_onnx


def test_a_runtime_for_cpus_says_which_package_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "no_gpu", lambda number: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert str(onnx_runtime.missing_cuda()).endswith("then pip install onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert onnx_runtime.missing_cuda() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnx_runtime.missing_cuda() == "ONNX Runtime is not installed: pip install onnxruntime"


def test_a_gpu_whose_libraries_do_not_load_is_an_error_and_not_a_slow_engine(tiny_onnx, monkeypatch, tmp_path) -> None:
    config = EngineConfig(backend="onnxruntime-cuda", gpu=1)
    graph = read_onnx(tiny_onnx("float"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", partial(_session, seen := []))
    with pytest.raises(EngineError, match="could not load its CUDA libraries"):
        onnx_runtime.build(graph, tmp_path / "unet.plan", config, device=onnx_runtime.Device.CUDA)
    assert seen == [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]


def _session(seen: list[Any], *arguments: Any, providers: list[Any]) -> Any:
    seen += providers
    return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])


def test_without_optimisation_no_layer_is_integer_but_the_result_is_the_same(tiny_onnx, feeds, tmp_path) -> None:
    path, outputs, counts = tiny_onnx("int8", quantize_outputs=True), [], []
    for level in ("basic", "all"):
        config = EngineConfig(backend="onnxruntime", optimisation=level, threads=1)
        file = build(path, tmp_path / f"{level}.plan", config)
        counts.append(file.audit.counts)
        with open_engine(file) as engine:
            outputs.append(engine(feeds(3))["eps"])
    assert all(precision == "float32" for _, precision in counts[0])
    assert ("convolution", "int8") in counts[1]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-2)
