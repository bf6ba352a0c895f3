"""Write GroupNorm as a factor and an offset per channel, which a runtime can merge with its neighbours.

Runtimes that have no kernel for GroupNormalization regroup the channels of the whole image, normalise, and regroup
again, and change the memory layout of the image on the way there and back. Here only the means of x and x^2 see the
image; what follows is a handful of numbers for each channel, and one multiplication and addition where the image is.
"""

import numpy as np
import onnx_ir as ir

from gaq_export.graph_writer import GraphWriter


def open_group_norms(model: ir.Model) -> ir.Model:
    """Rewrite every GroupNormalization of images (N, C, H, W) in place, and return the model."""
    write = GraphWriter(model.graph)
    axes = write.constant("group_norm.axes", np.array([2, 3], dtype=np.int64))
    last = write.constant("group_norm.last", np.array([2], dtype=np.int64))
    for node in list(model.graph):
        shape = node.outputs[0].shape
        if node.op_type == "GroupNormalization" and shape is not None and len(shape) == 4:
            _open(node, write, axes, last)
    return model


def _open(node: ir.Node, write: GraphWriter, axes: ir.Value, last: ir.Value) -> None:
    x, scale, bias = node.inputs
    assert x is not None
    assert scale is not None
    assert bias is not None
    assert scale.shape is not None
    channels, groups, name = int(scale.shape[0]), node.attributes["num_groups"].as_int(), f"{node.name}.open"  # type: ignore[arg-type]
    grouped = write.constant(f"{name}.grouped", np.array([-1, groups, channels // groups], dtype=np.int64))
    image = write.constant(f"{name}.image", np.array([-1, channels, 1, 1], dtype=np.int64))

    def group_mean(value: ir.Value, what: str) -> ir.Value:
        """Return (N, groups, 1)."""
        mean = write.node("ReduceMean", [value, axes], f"{name}.{what}.channel", attributes={"keepdims": 1})
        rows = write.node("Reshape", [mean, grouped], f"{name}.{what}.rows")
        return write.node("ReduceMean", [rows, last], f"{name}.{what}", attributes={"keepdims": 1})

    mean = group_mean(x, "mean")
    square = group_mean(write.node("Mul", [x, x], f"{name}.squared"), "square")
    variance = write.node("Sub", [square, write.node("Mul", [mean, mean], f"{name}.mean2")], f"{name}.variance")
    floor = write.constant(f"{name}.epsilon", np.float32(node.attributes["epsilon"].as_float()))
    positive = write.node("Max", [variance, write.constant(f"{name}.zero", np.float32(0))], f"{name}.positive")
    deviation = write.node("Sqrt", [write.node("Add", [positive, floor], f"{name}.floored")], f"{name}.deviation")
    factor = write.node("Div", [_rows(write, scale, name, "scale", groups), deviation], f"{name}.factor")
    moved = write.node("Mul", [mean, factor], f"{name}.moved")
    offset = write.node("Sub", [_rows(write, bias, name, "bias", groups), moved], f"{name}.offset")
    wide = [write.node("Reshape", [value, image], f"{name}.{what}4") for value, what in ((factor, "f"), (offset, "o"))]
    result = write.node("Add", [write.node("Mul", [x, wide[0]], f"{name}.scaled"), wide[1]], f"{name}.normal")
    result.shape = node.outputs[0].shape
    write.insert_before(node)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
    write.graph.remove(node)


def _rows(write: GraphWriter, value: ir.Value, name: str, what: str, groups: int) -> ir.Value:
    """Return a constant per channel (C,) as (groups, C / groups)."""
    assert value.const_value is not None
    return write.constant(f"{name}.{what}", value.const_value.numpy().reshape(groups, -1))
