"""New nodes have names of their own and go where they are put."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from gaq_export.graph.writer import GraphWriter


@pytest.fixture
def model() -> ir.Model:
    """Return y = -(x + x)."""
    return ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]>
            net (float[batch, 2] x) => (float[batch, 2] y)
            {
                sum = Add(x, x)
                y = Neg(sum)
            }"""
        )
    )


def _run(model: ir.Model, x: float) -> float:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return float(ReferenceEvaluator(proto).run(None, {"x": np.full((1, 2), x, np.float32)})[0][0, 0])


def test_a_name_that_is_taken_is_numbered(model: ir.Model) -> None:
    write = GraphWriter(model.graph)
    assert write.constant("sum", np.float32(1)).name == "sum.2"
    assert write.constant("sum", np.float32(1)).name == "sum.3"
    x = model.graph.inputs[0]
    out = write.node("Relu", [x], "x")
    assert out.name == "x.2"
    assert out.producer() is write.pending[0]


@pytest.mark.parametrize("array", [np.float32(2), np.array([1, 2]), np.ones((2, 3, 1), np.int8)])
def test_a_constant_keeps_its_shape_and_type(array: np.ndarray, model: ir.Model) -> None:
    value = GraphWriter(model.graph).constant("c", array)
    assert value.const_value is not None
    held = value.const_value.numpy()
    assert (held.shape, held.dtype) == (np.shape(array), array.dtype)
    assert np.array_equal(held, array)
    assert model.graph.initializers["c"] is value


def test_nodes_go_in_front_of_a_node_or_take_its_place(model: ir.Model) -> None:
    write = GraphWriter(model.graph)
    negate = model.graph[1]
    doubled = write.node("Mul", [negate.inputs[0], write.constant("two", np.float32(2))], "doubled")
    write.insert_before(negate)
    negate.replace_input_with(0, doubled)
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Neg"]
    assert _run(model, 3.0) == -12.0
    add = model.graph[0]
    write.replace(add, write.node("Mul", [add.inputs[0], add.inputs[1]], "squared"))
    assert [node.op_type for node in model.graph] == ["Mul", "Mul", "Neg"]
    assert write.pending == []
    assert _run(model, 3.0) == -18.0


def test_nodes_go_behind_a_node_or_at_the_end(model: ir.Model) -> None:
    write = GraphWriter(model.graph)
    half = write.constant("half", np.float32(0.5))
    add, negate = model.graph
    negate.replace_input_with(0, write.node("Mul", [add.outputs[0], half], "middle"))
    write.insert_after(add)
    last = write.node("Mul", [negate.outputs[0], half], "last")
    last.shape = negate.outputs[0].shape
    write.append()
    model.graph.outputs[:] = [last]
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Neg", "Mul"]
    assert _run(model, 3.0) == -1.5
