"""An ONNX file is read with every node named, and its weight layers and bytes are those that one counts by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engines import EngineError, LayerKind
from engines.graph import initializer_bytes, layer_kinds, read_onnx, tensor_specs
from tests.engines.conftest import CHANNELS, Graph, tiny_model


def test_nodes_without_a_name_or_with_that_of_another_get_one(tmp_path) -> None:
    model = tiny_model("float")
    model.graph.node[0].name = ""
    model.graph.node[2].name = model.graph.node[1].name
    onnx.save(model, tmp_path / "unnamed.onnx")
    names = [node.name for node in read_onnx(tmp_path / "unnamed.onnx").model.graph.node]
    assert len(set(names)) == len(names)
    assert names[0] == "Conv_at_0"
    assert names[1] == "node_conv"


@pytest.mark.parametrize("form", ["float", "int8", "int4", "int4cast"])
def test_a_weight_behind_other_nodes_is_a_weight(form: str) -> None:
    assert layer_kinds(tiny_model(form)) == {
        "node_conv_in": LayerKind.CONVOLUTION,
        "node_conv": LayerKind.CONVOLUTION,
        "node_linear": LayerKind.MATMUL,
    }


def test_four_bit_weights_count_half_a_byte() -> None:
    graph = Graph()
    graph.constants.append(onnx.helper.make_tensor("odd", TensorProto.INT4, (3, 3), np.ones(9, np.int8)))
    graph.constant("scale", np.ones(5, np.float32))
    image = {"x": (TensorProto.FLOAT, ["batch", CHANNELS])}
    graph.add("Identity", ["x"], "y")
    assert initializer_bytes(graph.model(image, {"y": image["x"]})) == {"int4": 5, "float32": 20}


def test_only_the_batch_may_be_dynamic() -> None:
    graph = Graph()
    graph.add("Identity", ["x"], "y")
    model = graph.model({"x": (TensorProto.FLOAT, ["batch", 3, "h", 8])}, {"y": (TensorProto.FLOAT, None)})
    with pytest.raises(EngineError, match=r"Input 'x' has shape \(None, 3, None, 8\); only the first"):
        tensor_specs(model)
