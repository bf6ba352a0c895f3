"""Write parts of a network so that OpenVINO can merge them with their neighbours; they compute the same.

GroupNorm: taken whole, it regroups the channels of the image, normalises, and regroups again, and changes the image's
memory layout on the way there and back. Here only the mean and the length of each channel see the image; what follows
is a handful of numbers for each channel, and one multiplication and addition where the image is.

Images become tokens, and tokens images, by way of (N, H, W, C), in which order the runtime holds an image anyway.

SiLU is written with a bare exponential, for which the runtime has less work than for its own sigmoid.
"""

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gaq_export.graph.writer import GraphWriter


def rewrite_for_openvino(model: ir.Model) -> ir.Model:
    """Rewrite every GroupNorm of images, passage between images and tokens, and SiLU in place; return the model."""
    write = GraphWriter(model.graph)
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            _open_norm(node, write)
    for node in list(model.graph):
        order = list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else None
        if order == [0, 2, 1]:
            _open_passage(node, write)
        elif order == [0, 2, 3, 1]:
            _open_keys(node, write)
        elif node.op_type == "Sigmoid":
            _open_silu(node, write)
    RemoveUnusedNodesPass()(model)
    return model


def _open_norm(node: ir.Node, write: GraphWriter) -> None:
    """Normalise an image (N, C, H, W), or one that was flattened to (N, C, H W) just before."""
    source = node.inputs[0]
    assert source is not None
    image, flattened = source, source.producer()
    if flattened is not None and flattened.op_type == "Reshape" and flattened.inputs[0] is not None:
        image = flattened.inputs[0]
    else:
        flattened = None
    size = _image_size(image)
    if size is None or _channels(source) != size[0]:
        return
    name = f"{node.name}.open"
    factor, offset = _factor_and_offset(node, image, write)
    result = write.node("Add", [write.node("Mul", [image, factor], f"{name}.scaled"), offset], f"{name}.normal")
    result.shape = image.shape
    if flattened is not None and (shape := flattened.inputs[1]) is not None:
        result = write.node("Reshape", [result, shape], f"{name}.flat")
    write.replace(node, result)


def _factor_and_offset(node: ir.Node, image: ir.Value, write: GraphWriter) -> list[ir.Value]:
    """Return what a GroupNormalization multiplies each channel by, and what it adds, (N, C, 1, 1) both."""
    rows = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
    size, groups, name = _image_size(image), node.attributes["num_groups"].as_int(), f"{node.name}.open"
    assert size is not None
    axes = write.constant(f"{name}.axes", np.array([2, 3], dtype=np.int64))
    last = write.constant(f"{name}.last", np.array([2], dtype=np.int64))
    grouped = write.constant(f"{name}.grouped", np.array([-1, groups, size[0] // groups], dtype=np.int64))
    scale, bias = (
        write.constant(f"{name}.{what}", row.reshape(groups, -1)) for what, row in zip("sb", rows, strict=True)
    )

    def group_mean(value: ir.Value, what: str) -> ir.Value:
        """Return the mean of (N, C, 1, 1) over each group, (N, groups, 1)."""
        in_rows = write.node("Reshape", [value, grouped], f"{name}.{what}.rows")
        return write.node("ReduceMean", [in_rows, last], f"{name}.{what}", attributes={"keepdims": 1})

    mean = group_mean(write.node("ReduceMean", [image, axes], f"{name}.channel", attributes={"keepdims": 1}), "mean")
    length = write.node("ReduceL2", [image, axes], f"{name}.length", attributes={"keepdims": 1})
    part = write.constant(f"{name}.part", np.float32(1 / math.prod(size[1:])))
    squared = write.node("Mul", [length, length], f"{name}.squared")
    square = group_mean(write.node("Mul", [squared, part], f"{name}.squares"), "square")
    variance = write.node("Sub", [square, write.node("Mul", [mean, mean], f"{name}.mean2")], f"{name}.variance")
    positive = write.node("Max", [variance, write.constant(f"{name}.zero", np.float32(0))], f"{name}.positive")
    floor = write.constant(f"{name}.epsilon", np.float32(node.attributes["epsilon"].as_float()))
    deviation = write.node("Sqrt", [write.node("Add", [positive, floor], f"{name}.floored")], f"{name}.deviation")
    factor = write.node("Div", [scale, deviation], f"{name}.factor")
    offset = write.node("Sub", [bias, write.node("Mul", [mean, factor], f"{name}.moved")], f"{name}.offset")
    wide = write.constant(f"{name}.wide", np.array([-1, size[0], 1, 1], dtype=np.int64))
    return [write.node("Reshape", [value, wide], f"{value.name}.wide") for value in (factor, offset)]


def _open_passage(node: ir.Node, write: GraphWriter) -> None:
    """Write (N, C, H, W) -> (N, C, H W) -> (N, H W, C), or the way back, as a transposition of four dimensions."""
    source, uses = node.inputs[0], list(node.outputs[0].uses())
    assert source is not None
    before, after = source.producer(), uses[0].node
    image = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
    size = _image_size(after.outputs[0]) if after.op_type == "Reshape" and len(uses) == 1 else None
    if size is not None and _channels(node.outputs[0]) == size[0]:
        shape = write.constant(f"{node.name}.image", np.array([0, *size[1:], size[0]], dtype=np.int64))
        nhwc = write.node("Reshape", [source, shape], f"{node.name}.nhwc")
        nchw = write.node("Transpose", [nhwc], f"{node.name}.nchw", attributes={"perm": [0, 3, 1, 2]})
        write.replace(after, nchw)
    elif image is not None and (size := _image_size(image)) and _channels(source) == size[0]:
        nhwc = write.node("Transpose", [image], f"{node.name}.nhwc", attributes={"perm": [0, 2, 3, 1]})
        shape = write.constant(f"{node.name}.tokens", np.array([0, -1, size[0]], dtype=np.int64))
        write.replace(node, write.node("Reshape", [nhwc, shape], f"{node.name}.flat"))


def _open_keys(node: ir.Node, write: GraphWriter) -> None:
    """Write (N, L, heads, D) -> (N, heads, D, L), before a product, in two: the product takes in the second."""
    source = node.inputs[0]
    if source is not None and all(use.node.op_type == "MatMul" for use in node.outputs[0].uses()):
        heads = write.node("Transpose", [source], f"{node.name}.heads", attributes={"perm": [0, 2, 1, 3]})
        write.replace(node, write.node("Transpose", [heads], f"{node.name}.keys", attributes={"perm": [0, 1, 3, 2]}))


def _open_silu(node: ir.Node, write: GraphWriter) -> None:
    """Write x sigmoid(x) as n / (-1 - exp(n)) with n = -x, in which the runtime does not recognise its own SiLU."""
    x, uses = node.inputs[0], list(node.outputs[0].uses())
    product = uses[0].node
    if x is None or len(uses) > 1 or product.op_type != "Mul" or x not in product.inputs:
        return
    minus = write.constant(f"{node.name}.minus", np.float32(-1))
    negative = write.node("Mul", [x, minus], f"{node.name}.negative")
    below = write.node("Sub", [minus, write.node("Exp", [negative], f"{node.name}.power")], f"{node.name}.below")
    write.replace(product, write.node("Div", [negative, below], f"{node.name}.silu"))


def _channels(value: ir.Value) -> int | None:
    """Return the size of axis 1, if it is known: what was flattened has as many channels as the image."""
    size = None if value.shape is None or len(value.shape) < 2 else value.shape[1]
    return size if isinstance(size, int) else None


def _image_size(value: ir.Value) -> tuple[int, int, int] | None:
    """Return (C, H, W) of an image whose size is known, else None."""
    if value.shape is None or len(value.shape) != 4:
        return None
    channels, height, width = value.shape[1:]
    if isinstance(channels, int) and isinstance(height, int) and isinstance(width, int):
        return channels, height, width
    return None
