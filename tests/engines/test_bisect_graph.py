"""The node that a builder cannot take is found by building the beginnings of the graph."""

import onnx
import pytest
from onnx import TensorProto

from engines.bisect_graph import first_failing_node, graph_up_to
from tests.engines.conftest import Graph, tiny_model

IMAGE = {"x": (TensorProto.FLOAT, ["batch", 4, 8, 8])}


def _chain(ops: list[str]) -> onnx.ModelProto:
    graph = Graph()
    for i, op in enumerate(ops):
        graph.add(op, [f"y{i - 1}" if i else "x"], f"y{i}")
    return graph.model(IMAGE, {f"y{len(ops) - 1}": IMAGE["x"]})


@pytest.mark.parametrize("bad", range(7))
def test_the_first_bad_node_is_found_with_few_builds(bad: int) -> None:
    ops = ["Relu"] * 7
    ops[bad] = "Sin"
    asked = 0

    def builds(part: onnx.ModelProto) -> bool:
        nonlocal asked
        asked += 1
        onnx.checker.check_model(part, full_check=True)
        return all(node.op_type != "Sin" for node in part.graph.node)

    assert first_failing_node(_chain(ops), builds).name == f"node_y{bad}"
    assert asked <= 3


@pytest.mark.parametrize("form", ["float", "int8", "int4", "int4cast"])
def test_every_beginning_of_a_quantized_graph_is_a_graph(form: str) -> None:
    model = onnx.shape_inference.infer_shapes(tiny_model(form))
    sizes = []
    for last in range(len(model.graph.node)):
        if part := graph_up_to(model, last):
            onnx.checker.check_model(part, full_check=True)
            sizes.append(len(part.graph.node))
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(model.graph.node)


def test_a_weight_is_part_of_the_layer_that_reads_it() -> None:
    model = tiny_model("int4cast")
    weights = {"DequantizeLinear", "Cast"}
    blamed = {
        first_failing_node(model, lambda part, name=node.name: name not in {n.name for n in part.graph.node}).op_type
        for node in model.graph.node
        if node.op_type in weights and "w_" in node.name
    }
    assert blamed <= {"Conv", "Gemm", "MatMul"}
    assert blamed
