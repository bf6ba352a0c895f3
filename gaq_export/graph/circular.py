"""Write circular padding as slices that are joined: neither OpenVINO nor TensorRT has it.

In:  x (N, C, ..., W) -> Pad(wrap, a before and b behind)
Out: x -> Slice(last a) + x + Slice(first b) -> Concat, once for each padded axis.

Values are only copied, so a layer behind it may round its input before or after.
"""

import numpy as np
import onnx_ir as ir

from gaq_export.graph.writer import GraphWriter

_END = np.iinfo(np.int64).max


def unroll_circular_pads(graph: ir.Graph) -> None:
    """Rewrite every Pad of mode "wrap" whose widths are constant and not negative, in place."""
    write = GraphWriter(graph)
    for node in list(graph):
        if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "wrap":
            continue
        x, pads, _, axes = (*node.inputs, None, None)[:4]
        if x is None or x.shape is None or pads is None or pads.const_value is None:
            continue
        widths = pads.const_value.numpy().tolist()
        over = range(len(x.shape)) if axes is None or axes.const_value is None else axes.const_value.numpy().tolist()
        if min(widths) < 0:
            continue
        for i, axis in enumerate(over):
            x = _padded(write, x, axis, widths[i], widths[i + len(widths) // 2], f"{node.name}.{i}")
        write.replace(node, x)


def _padded(write: GraphWriter, x: ir.Value, axis: int, before: int, after: int, name: str) -> ir.Value:
    """Return `x` with its last `before` entries along an axis also in front of it, its first `after` also behind."""

    def cut(start: int, end: int, what: str) -> ir.Value:
        bounds = zip(("start", "end", "axis"), (start, end, axis), strict=True)
        inputs = [write.constant(f"{name}.{what}.{key}", np.array([number], dtype=np.int64)) for key, number in bounds]
        return write.node("Slice", [x, *inputs], f"{name}.{what}")

    parts = [cut(-before, _END, "last")] if before else []
    parts += [x, cut(0, after, "first")] if after else [x]
    return write.node("Concat", parts, name, attributes={"axis": axis}) if len(parts) > 1 else x
