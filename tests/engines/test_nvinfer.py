"""Builds in a child process, with a stand-in for TensorRT: logs are read, crashes become messages that name a node."""

import textwrap
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from engines import EngineConfig, EngineError
from engines import nvinfer as nvinfer_module
from engines.driver import no_gpu
from engines.graph import OnnxGraph
from tests.engines.conftest import Graph

IMAGE = (TensorProto.FLOAT, ["batch", 4, 8, 8])
# Takes any graph, except that it refuses Cos as a parser, Tan as a builder, and is killed by Sin.
STAND_IN = """
    import os, signal
    from types import SimpleNamespace as Of

    import onnx


    class ILogger:
        Severity = Of(ERROR=1, INTERNAL_ERROR=2, VERBOSE=5)


    BuilderFlag = NetworkDefinitionCreationFlag = Of()
    ProfilingVerbosity = Of(DETAILED="detailed")


    class Builder:
        def __init__(self, logger):
            self.logger = logger

        def create_network(self, flags):
            return Of(num_inputs=1, get_input=lambda index: Of(name="x", shape=(-1, 4, 8, 8)))

        def create_builder_config(self):
            return Of(add_optimization_profile=lambda profile: None)

        def create_optimization_profile(self):
            return Of(set_shape=lambda name, *shapes: self.logger.log(5, f"{name} {shapes}"))

        def build_serialized_network(self, network, config):
            assert config.profiling_verbosity == "detailed"
            ops = {node.op_type for node in network.model.graph.node}
            if "Sin" in ops:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "Tan" in ops:
                return self.logger.log(1, "no kernel for this")
            operand = "{ Name: %s, Dimensions: [%s], Strides: [1], Datatype: Int8, Format: Linear }"
            line = "Name: conv, LayerType: correlation, Inputs: [ %s], Constants: [ %s], Outputs: [ ], Metadata: %s"
            tensors = operand % ("a", "-1,4,8,8"), operand % ("w", "4,4,3,3")
            self.logger.log(5, "Layers:\\n" + line % (*tensors, "[ONNX Layer: node_y]"))
            return b"an engine"


    class OnnxParser:
        num_errors = 1

        def __init__(self, network, logger):
            self.network = network

        def parse(self, content, beside):
            self.network.model = onnx.load_from_string(content)
            return all(node.op_type != "Cos" for node in self.network.model.graph.node)

        def get_error(self, index):
            return Of(node_name=lambda: "node_bad", node_operator=lambda: "Cos", desc=lambda: "unsupported")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "stand_in_trt.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "stand_in_trt"


def _graph(tmp_path: Path, *ops: str) -> OnnxGraph:
    """Return a convolution named node_y followed by `ops`."""
    graph = Graph()
    last = graph.add("Conv", ["x", graph.weight("w", "int8", (4, 4, 3, 3), axis=0)], "y", pads=[1, 1, 1, 1])
    for i, op in enumerate(ops):
        last = graph.add(op, [last], f"z{i}")
    return OnnxGraph(model=graph.model({"x": IMAGE}, {last: IMAGE}), folder=tmp_path)


CONFIG = EngineConfig(backend="tensorrt", batch=(1, 2, 8))


def test_an_engine_is_written_and_its_layer_list_audited(module: str, tmp_path: Path) -> None:
    audit = nvinfer_module.build(module, _graph(tmp_path, "Relu"), tmp_path / "unet.plan", CONFIG)
    assert (tmp_path / "unet.plan").read_bytes() == b"an engine"
    assert audit.counts == {("convolution", "int8"): 1}


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("Sin", r"^tensorrt: the builder crashed \(SIGSEGV\) \(the graph builds up to node 'node_z1', Sin, and not"),
        ("Tan", r"^tensorrt cannot build this model: no kernel for this \(the graph builds up to node 'node_z1', Tan"),
        ("Cos", r"^tensorrt cannot build this model: parser, node 'node_bad' \(Cos\): unsupported$"),
    ],
)
def test_a_node_that_cannot_be_built_is_named(op: str, message: str, module: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        nvinfer_module.build(module, _graph(tmp_path, "Relu", op, "Relu"), tmp_path / "unet.plan", CONFIG)
    assert not (tmp_path / "unet.plan").exists()


def test_a_module_that_cannot_be_imported_is_an_error_of_one_line(module: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^tensorrt cannot build this model: ModuleNotFoundError: .*no_such_trt'$"):
        nvinfer_module.build("no_such_trt", _graph(tmp_path), tmp_path / "unet.plan", CONFIG)


def test_a_computed_scale_is_recognised() -> None:
    graph = Graph()
    graph.add("Gather", [graph.constant("table", onnx.numpy_helper.to_array(_scales())), "step"], "scale")
    graph.add("QuantizeLinear", ["x", "scale"], "q")
    graph.add("DequantizeLinear", ["q", "scale"], "dq")
    graph.add("Relu", ["dq"], "y")
    model = graph.model({"x": IMAGE, "step": (TensorProto.INT64, [])}, {"y": IMAGE})
    assert nvinfer_module._computed_scale(model, model.graph.node[-1])
    assert not nvinfer_module._computed_scale(model, model.graph.node[0])


def _scales() -> onnx.TensorProto:
    return onnx.helper.make_tensor("scales", TensorProto.FLOAT, (2,), [0.1, 0.2])


@pytest.mark.parametrize(("visible", "gpu", "seen"), [
    (None, 0, {}), ("2,3", 0, {}), (None, 1, {"CUDA_VISIBLE_DEVICES": "1"}), ("2,3", 1, {"CUDA_VISIBLE_DEVICES": "3"}),
])  # fmt: skip
def test_the_builder_sees_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, visible, gpu, seen) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvinfer_module._only(gpu) == seen


@pytest.mark.skipif(no_gpu() is None, reason="this machine has an NVIDIA GPU")
def test_what_is_missing_to_run_is_named_in_the_order_to_install_it() -> None:
    assert nvinfer_module.cannot_run("no_such_trt", "no-such") == "no_such_trt is not installed: pip install no-such"
    assert "NVIDIA" in str(nvinfer_module.cannot_run("onnx", "onnx"))
