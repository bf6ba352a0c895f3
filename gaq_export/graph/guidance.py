"""Classifier-free guidance inside a graph: one call of twice the batch, its scale an input.

    (x, step, told ...) -> eps    becomes    (x, step, told ..., nothing_told ..., guidance) -> eps

All inputs have as many rows as there are images, `guidance` (1,) but one. Inside, half of the samples are told what
stands for nothing, and eps is led away from what they get (Ho and Salimans 2022):

    eps = eps(nothing) + guidance * (eps(told) - eps(nothing))

Where every image has a step of its own, `step` (N,), it has a `guidance` too.
"""

import numpy as np
import onnx_ir as ir

from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL
from gaq_export.graph.writer import GraphWriter

DOUBLED = "samples"  # what the batch is called inside


def add_guidance(graph: ir.Graph, *, rows: bool = False) -> ir.Value:
    """Put guidance around the network of a graph in place, and return what is the step inside.

    Args:
        graph: its inputs are x, the step, and what the network is told.
        rows: whether the step is (N,), and not (1,).
    """
    x, step, *condition = graph.inputs
    (epsilon,) = graph.outputs
    dims = list(x.shape or ())
    batch = dims[0] if dims else None
    for node in graph:
        for out in node.outputs:
            if out.shape is not None:
                out.shape = ir.Shape([DOUBLED if size == batch else size for size in out.shape])
    write = GraphWriter(graph)
    unconditional = [
        ir.Value(name=f"{UNCONDITIONAL}{v.name}", type=v.type, shape=ir.Shape(v.shape or ())) for v in condition
    ]
    inside = step
    for first, second in ((x, x), *([(step, step)] if rows else []), *zip(unconditional, condition, strict=True)):
        uses = list(second.uses())
        both = write.node(
            "Concat", [first, second], f"guidance.{second.name}", second.dtype or ir.DataType.FLOAT, {"axis": 0}
        )
        for user, index in uses:
            user.replace_input_with(index, both)
        inside = both if second is step else inside
    write.insert_before(graph[0])
    scale = ir.Value(name=GUIDANCE, type=ir.TensorType(ir.DataType.FLOAT), shape=step.shape)
    graph.inputs.extend([*unconditional, scale])
    epsilon.name = "guidance.samples"
    shape = write.constant("guidance.shape", np.array([2, -1, *dims[1:]], dtype=np.int64))
    halves = write.node("Reshape", [epsilon, shape], "guidance.halves")  # (2N, C, H, W) -> (2, N, C, H, W)
    without, with_it = (
        write.node("Gather", [halves, write.constant(f"guidance.{name}.half", np.int64(i))], f"guidance.{name}")
        for i, name in enumerate(("unconditional", "conditional"))
    )
    factor = scale
    if rows:
        wide = write.constant("guidance.wide", np.array([-1, 1, 1, 1], dtype=np.int64))
        factor = write.node("Reshape", [scale, wide], "guidance.factor")
    away = write.node("Mul", [write.node("Sub", [with_it, without], "guidance.difference"), factor], "guidance.away")
    guided = write.node("Add", [without, away], "eps")
    write.append()
    guided.shape = ir.Shape(x.shape or ())
    graph.outputs[:] = [guided]
    return inside
