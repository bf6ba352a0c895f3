"""Rewrite parts of a network so that OpenVINO can merge them with their neighbours; they compute the same.

In: a graph, quantized or not. Out: the same graph with other operators for

- GroupNorm. OpenVINO's own regroups the channels of the image, normalises, and regroups again, and changes the memory
  layout of the image on the way there and back. Here only the mean and the length of each channel read the image; the
  rest is a few numbers for each channel, and one multiplication and one addition on the image.
- the way from images to tokens and back. It goes through (N, H, W, C), the order in which OpenVINO holds an image
  anyway, so that the transposition moves no memory.
- the keys of attention. A product can take in a transposition of the last two axes, if it is a node of its own.
- SiLU. A bare exponential costs OpenVINO less than its own sigmoid.
"""

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gaq_export.graph.writer import GraphWriter


def rewrite_for_openvino(model: ir.Model) -> ir.Model:
    """Rewrite all of these in `model`, in place, and return the model."""
    write = GraphWriter(model.graph)
    # Norms first: they may read a flattened image, whose Reshape the rewrite of the tokens would take away.
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            _rewrite_norm(node, write)
    for node in list(model.graph):
        order = list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else None
        if order == [0, 2, 1]:
            _rewrite_tokens(node, write)
        elif order == [0, 2, 3, 1]:
            _rewrite_keys(node, write)
        elif node.op_type == "Sigmoid":
            _rewrite_silu(node, write)
    RemoveUnusedNodesPass()(model)
    return model


def _rewrite_norm(node: ir.Node, write: GraphWriter) -> None:
    """Rewrite the norm of an image (N, C, H, W), or of one that was flattened to (N, C, H*W) just before.

    In: image [-> Reshape] -> GroupNormalization. Out: image -> Mul(factor) -> Add(offset) [-> Reshape], where factor
    and offset are (N, C, 1, 1). Norms of anything else stay as they are.
    """
    source = node.inputs[0]
    assert source is not None
    image = source
    flattened = source.producer()
    if flattened is not None and flattened.op_type == "Reshape" and flattened.inputs[0] is not None:
        image = flattened.inputs[0]
    else:
        flattened = None
    size = _image_size(image)
    if size is None or _channels(source) != size[0]:  # reshaped to something else than its channels
        return
    name = f"{node.name}.open"
    factor, offset = _factor_and_offset(node, image, write)
    result = write.node("Add", [write.node("Mul", [image, factor], f"{name}.scaled"), offset], f"{name}.normal")
    result.shape = image.shape
    if flattened is not None and (shape := flattened.inputs[1]) is not None:  # (N, C, H, W) -> (N, C, H*W)
        result = write.node("Reshape", [result, shape], f"{name}.flat")
    write.replace(node, result)


def _factor_and_offset(node: ir.Node, image: ir.Value, write: GraphWriter) -> list[ir.Value]:
    """Return what a GroupNormalization multiplies each channel by, and what it adds, both (N, C, 1, 1).

    With m and q the means of x and x^2 over a group, and s, b the norm's scale and bias:

        factor = s / sqrt(max(q - m^2, 0) + epsilon),    offset = b - m * factor
    """
    rows = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
    size = _image_size(image)
    groups = node.attributes["num_groups"].as_int()
    name = f"{node.name}.open"
    assert size is not None
    axes = write.constant(f"{name}.axes", np.array([2, 3], dtype=np.int64))
    last = write.constant(f"{name}.last", np.array([2], dtype=np.int64))
    grouped = write.constant(f"{name}.grouped", np.array([-1, groups, size[0] // groups], dtype=np.int64))
    scale, bias = (
        write.constant(f"{name}.{what}", row.reshape(groups, -1)) for what, row in zip("sb", rows, strict=True)
    )

    def group_mean(value: ir.Value, what: str) -> ir.Value:
        """Return the mean over each group: (N, C, 1, 1) -> (N, groups, C / groups) -> (N, groups, 1)."""
        in_rows = write.node("Reshape", [value, grouped], f"{name}.{what}.rows")
        return write.node("ReduceMean", [in_rows, last], f"{name}.{what}", attributes={"keepdims": 1})

    # The only two reductions over the image: the mean and the L2 norm of each channel, which OpenVINO has kernels for.
    mean = group_mean(write.node("ReduceMean", [image, axes], f"{name}.channel", attributes={"keepdims": 1}), "mean")
    length = write.node("ReduceL2", [image, axes], f"{name}.length", attributes={"keepdims": 1})
    part = write.constant(f"{name}.part", np.float32(1 / math.prod(size[1:])))
    squared = write.node("Mul", [length, length], f"{name}.squared")
    square = group_mean(write.node("Mul", [squared, part], f"{name}.squares"), "square")
    # A difference of large numbers: of a constant image it may come out below 0, which the root would not survive.
    variance = write.node("Sub", [square, write.node("Mul", [mean, mean], f"{name}.mean2")], f"{name}.variance")
    positive = write.node("Max", [variance, write.constant(f"{name}.zero", np.float32(0))], f"{name}.positive")
    floor = write.constant(f"{name}.epsilon", np.float32(node.attributes["epsilon"].as_float()))
    deviation = write.node("Sqrt", [write.node("Add", [positive, floor], f"{name}.floored")], f"{name}.deviation")
    factor = write.node("Div", [scale, deviation], f"{name}.factor")
    offset = write.node("Sub", [bias, write.node("Mul", [mean, factor], f"{name}.moved")], f"{name}.offset")
    wide = write.constant(f"{name}.wide", np.array([-1, size[0], 1, 1], dtype=np.int64))
    return [write.node("Reshape", [value, wide], f"{value.name}.wide") for value in (factor, offset)]


def _rewrite_tokens(node: ir.Node, write: GraphWriter) -> None:
    """Rewrite the way from an image to tokens, or back, so that the transposition is of four dimensions.

    In:  (N, C, H, W) -Reshape-> (N, C, H*W) -Transpose-> (N, H*W, C)
    Out: (N, C, H, W) -Transpose-> (N, H, W, C) -Reshape-> (N, H*W, C)

    and the reverse of both. A transposition of three dimensions without an image on either side stays as it is.
    """
    source = node.inputs[0]
    uses = list(node.outputs[0].uses())
    assert source is not None
    before = source.producer()
    after = uses[0].node
    image = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
    size = _image_size(after.outputs[0]) if after.op_type == "Reshape" and len(uses) == 1 else None
    if size is not None and _channels(node.outputs[0]) == size[0]:
        # Tokens to image; 0 in a shape means "as the input", here the batch.
        shape = write.constant(f"{node.name}.image", np.array([0, *size[1:], size[0]], dtype=np.int64))
        nhwc = write.node("Reshape", [source, shape], f"{node.name}.nhwc")
        nchw = write.node("Transpose", [nhwc], f"{node.name}.nchw", attributes={"perm": [0, 3, 1, 2]})
        write.replace(after, nchw)
    elif image is not None and (size := _image_size(image)) and _channels(source) == size[0]:
        nhwc = write.node("Transpose", [image], f"{node.name}.nhwc", attributes={"perm": [0, 2, 3, 1]})
        shape = write.constant(f"{node.name}.tokens", np.array([0, -1, size[0]], dtype=np.int64))
        write.replace(node, write.node("Reshape", [nhwc, shape], f"{node.name}.flat"))


def _rewrite_keys(node: ir.Node, write: GraphWriter) -> None:
    """Split the transposition of the keys in two, of which the product takes in the second.

    In:  (N, L, heads, D) -Transpose-> (N, heads, D, L) -> MatMul
    Out: (N, L, heads, D) -Transpose-> (N, heads, L, D) -Transpose-> (N, heads, D, L) -> MatMul
    """
    source = node.inputs[0]
    if source is not None and all(use.node.op_type == "MatMul" for use in node.outputs[0].uses()):
        heads = write.node("Transpose", [source], f"{node.name}.heads", attributes={"perm": [0, 2, 1, 3]})
        write.replace(node, write.node("Transpose", [heads], f"{node.name}.keys", attributes={"perm": [0, 1, 3, 2]}))


def _rewrite_silu(node: ir.Node, write: GraphWriter) -> None:
    """Rewrite x sigmoid(x) as n / (-1 - exp(n)) with n = -x, in which OpenVINO does not recognise its own SiLU.

    In: x -> Sigmoid -> Mul(x). Out: x -> Mul(-1) = n -> Exp -> Sub from -1 -> Div of n by it. For large n the
    exponential overflows to infinity, and the quotient is 0, as it should be.
    """
    x = node.inputs[0]
    uses = list(node.outputs[0].uses())
    product = uses[0].node
    if x is None or len(uses) > 1 or product.op_type != "Mul" or x not in product.inputs:
        return
    minus = write.constant(f"{node.name}.minus", np.float32(-1))
    negative = write.node("Mul", [x, minus], f"{node.name}.negative")
    below = write.node("Sub", [minus, write.node("Exp", [negative], f"{node.name}.power")], f"{node.name}.below")
    write.replace(product, write.node("Div", [negative, below], f"{node.name}.silu"))


def _channels(value: ir.Value) -> int | None:
    """Return the size of axis 1 if it is known: an image and its flattened form have their channels there."""
    size = None if value.shape is None or len(value.shape) < 2 else value.shape[1]
    return size if isinstance(size, int) else None


def _image_size(value: ir.Value) -> tuple[int, int, int] | None:
    """Return (C, H, W) of an image (N, C, H, W) whose size is known, else None."""
    if value.shape is None or len(value.shape) != 4:
        return None
    channels, height, width = value.shape[1:]
    if isinstance(channels, int) and isinstance(height, int) and isinstance(width, int):
        return channels, height, width
    return None
