"""Guidance inside a graph is the formula, computed outside, of two runs of the network."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from gaq_export.graph.guidance import add_guidance

MODEL = """<ir_version: 10, opset_import: ["": 21]>
net (float[batch, 1, 2, 2] x, int64[STEPS] step, float[batch, 1, 1, 1] cond) => (float[batch, 1, 2, 2] eps)
    <float[3, 1, 1, 1] table = {1.0, 10.0, 100.0}>
{
    row = Gather(table, step)
    mixed = Mul(x, cond)
    eps = Mul(mixed, row)
}"""
X = np.linspace(-1, 1, 3 * 4, dtype=np.float32).reshape(3, 1, 2, 2)
COND = np.array([2, 3, 4], np.float32).reshape(3, 1, 1, 1)
NULL = np.array([0.5, 0.25, 0.125], np.float32).reshape(3, 1, 1, 1)
Floats = npt.NDArray[np.float32]


def _network(x: Floats, step: npt.NDArray[np.int64], cond: Floats) -> Floats:
    table = np.array([1, 10, 100], np.float32).reshape(3, 1, 1, 1)
    result: Floats = x * cond * table[step]
    return result


def _guided(step: npt.NDArray[np.int64], scale: Floats) -> Floats:
    without = _network(X, step, NULL)
    return without + scale.reshape(-1, 1, 1, 1) * (_network(X, step, COND) - without)


@pytest.mark.parametrize("step_per_image", [False, True])
def test_the_graph_computes_the_formula(step_per_image: bool) -> None:
    model = ir.from_proto(onnx.parser.parse_model(MODEL.replace("STEPS", "batch" if step_per_image else "1")))
    index = add_guidance(model.graph, step_per_image=step_per_image)
    assert (index is model.graph.inputs[1]) == (not step_per_image)
    assert [value.name for value in model.graph.inputs] == ["x", "step", "cond", "unconditional_cond", "guidance"]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    step = np.array([2, 0, 1]) if step_per_image else np.array([1])
    scale = np.array([3, 1, 0] if step_per_image else [7.5], np.float32)
    feeds = {"x": X, "step": step, "cond": COND, "unconditional_cond": NULL, "guidance": scale}
    (eps,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(eps, _guided(step, scale), rtol=1e-5)


def test_the_batch_inside_has_a_name_of_its_own() -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(MODEL.replace("STEPS", "1"))))
    add_guidance(model.graph)
    shapes = {out.name: [str(size) for size in out.shape or ()] for node in model.graph for out in node.outputs}
    assert shapes["mixed"][0] == "samples"
    assert [str(size) for size in model.graph.outputs[0].shape or ()] == ["batch", "1", "2", "2"]
