"""What ONNX Runtime alone is asked: which device, how far to optimise, and what is missing."""

import importlib.util

import numpy as np
import onnxruntime
import pytest

from engines import EngineConfig, EngineError, build, onnx_runtime, open_engine


def test_a_runtime_for_cpus_says_which_package_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "no_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert str(onnx_runtime.missing_cuda()).endswith("then pip install onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert onnx_runtime.missing_cuda() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnx_runtime.missing_cuda() == "ONNX Runtime is not installed: pip install onnxruntime"


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_whose_libraries_do_not_load_is_an_error_and_not_a_slow_engine(tiny_onnx, monkeypatch) -> None:
    monkeypatch.setattr(onnx_runtime, "_PROVIDERS", {"cpu": ["CUDAExecutionProvider", "CPUExecutionProvider"]})
    with pytest.raises(EngineError, match="could not load its CUDA libraries"):
        build(tiny_onnx("float"), tiny_onnx("float").with_suffix(".plan"), EngineConfig(backend="onnxruntime"))


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
