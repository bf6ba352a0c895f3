"""A graph in float64 computes to float64's precision, and its integers are what they were."""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from gaq_export.graph.float64 import to_float64

MODEL = """<ir_version: 10, opset_import: ["": 21]>
net (float[2] x, int64[2] t) => (float[2] y) <float[1] third = {0.3333333432674408}, int64[1] axis = {0}>
{
    real = Cast <to = 1> (t)
    one = Constant <value = float[1] {1.0}> ()
    shifted = Add(real, one)
    scaled = Mul(shifted, third)
    total = Mul(scaled, x)
    y = ReduceSum <keepdims = 1> (total, axis)
}"""


def test_every_float_is_wide_and_no_integer_changes() -> None:
    model = to_float64(onnx.parser.parse_model(MODEL))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {"third": TensorProto.DOUBLE, "axis": TensorProto.INT64}
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [TensorProto.DOUBLE, TensorProto.INT64]
    third = next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "third")
    x, t = np.array([1 / 3, 1e-9]), np.array([16_777_217, 3])  # not a float32: 2^24 + 1
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "t": t})
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, [((t + 1) * third * x).sum()], rtol=1e-15)
