"""The GPU check says "not run" where there is no GPU, and finds the layer in which a runtime differs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.backend.onnxrt import OnnxrtRunner

from engines.driver import no_gpu
from layerwise import compare_layers, onnxruntime_runner
from tests.engines.conftest import tiny_feeds, tiny_model


@pytest.mark.skipif(no_gpu() is None, reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_it_says_so_and_is_content(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    found = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("gpu-check: not run: no NVIDIA ")


def test_layers_are_compared_one_by_one(tmp_path: Path) -> None:
    graph = tmp_path / "tiny.onnx"
    model = tiny_model("int8")
    onnx.save(model, graph)

    def optimised(file: bytes, feeds: object) -> OnnxrtRunner:
        return onnxruntime_runner(file, "ORT_ENABLE_EXTENDED")

    def broken(file: bytes, feeds: object) -> OnnxrtRunner:
        other = onnx.load_from_string(file)
        for tensor in other.graph.initializer:
            if tensor.name == "w_conv.codes":
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        return onnxruntime_runner(other.SerializeToString())

    same, differ = (compare_layers(graph, tiny_feeds(2), make) for make in (optimised, broken))
    assert min(same.values()) > 80
    assert next(name for name, db in differ.items() if db < 20) == "conv"
    assert differ.keys() == same.keys()
    assert np.isfinite(list(differ.values())).all()
