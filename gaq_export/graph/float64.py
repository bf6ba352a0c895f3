"""An ONNX graph in float64, for tables that are computed once and for checks where rounding must not interfere.

In: a float32 graph. Out: the same graph in float64; codes, indices and shapes stay integers.
"""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every float32 tensor and type of `model` into float64, in place, and return the model."""
    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            # Cast's target type, and the type in which a normalisation computes.
            elif attribute.name in ("to", "stash_type") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    """Convert a float32 tensor in place; leave others as they are."""
    if tensor.data_type == TensorProto.FLOAT:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
