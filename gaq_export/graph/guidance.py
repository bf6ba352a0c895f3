"""Classifier-free guidance inside a graph: one run of the network at twice the batch, the scale an input.

    (x, step, cond ...) -> eps    becomes    (x, step, cond ..., unconditional cond ..., guidance) -> eps

Inputs have one row for each image, except `step` and `guidance`, (1,). Inside, the batch is doubled: the first half of
the rows gets the unconditional condition, the second half the image's own, and the predicted noise is extrapolated from
one to the other (Ho and Salimans 2022):

    eps = eps(unconditional) + guidance * (eps(cond) - eps(unconditional))

Where every image has its own step, `step` (N,), it has its own scale too, `guidance` (N,).
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL
from gaq_export.graph.writer import GraphWriter

DOUBLED = "samples"  # name of the doubled batch dimension


def add_guidance(graph: ir.Graph, *, step_per_image: bool = False) -> ir.Value:
    """Put guidance around the network of a graph, in place.

    Args:
        graph: its inputs are x (N, C, H, W), the step, and the condition by name; its output is eps.
        step_per_image: the step is (N,), one for each image, and not (1,).

    Returns:
        The step as the network inside reads it: (1,), or (2N,) with a step for each image.
    """
    x, step, *condition = graph.inputs
    unconditional = [
        ir.Value(name=f"{UNCONDITIONAL}{v.name}", type=v.type, shape=ir.Shape(v.shape or ())) for v in condition
    ]
    _rename_batch(graph, x)
    index = _double_inputs(graph, unconditional, step_per_image=step_per_image)
    scale = ir.Value(name=GUIDANCE, type=ir.TensorType(ir.DataType.FLOAT), shape=step.shape)
    graph.inputs.extend([*unconditional, scale])
    _combine(graph, scale, step_per_image=step_per_image)
    return index


def _rename_batch(graph: ir.Graph, x: ir.Value) -> None:
    """Give the batch dimension another name inside, where it is twice as long as that of the inputs."""
    dims = list(x.shape or ())
    batch = dims[0] if dims else None
    for node in graph:
        for out in node.outputs:
            if out.shape is not None:
                out.shape = ir.Shape([DOUBLED if size == batch else size for size in out.shape])


def _double_inputs(graph: ir.Graph, unconditional: Sequence[ir.Value], *, step_per_image: bool) -> ir.Value:
    """Make the network read (2N, ...) where it read an input (N, ...), and return the step that it reads now."""
    write = GraphWriter(graph)
    x, step, *condition = graph.inputs
    pairs = [(x, x), *([(step, step)] if step_per_image else []), *zip(unconditional, condition, strict=True)]
    index = step
    for first, second in pairs:
        uses = list(second.uses())  # before the Concat below becomes one of them
        both = write.node(
            "Concat", [first, second], f"guidance.{second.name}", second.dtype or ir.DataType.FLOAT, {"axis": 0}
        )
        for user, position in uses:
            user.replace_input_with(position, both)
        index = both if second is step else index
    write.insert_before(graph[0])
    return index


def _combine(graph: ir.Graph, scale: ir.Value, *, step_per_image: bool) -> None:
    """Make one prediction of the two: eps (2N, C, H, W) -> (N, C, H, W)."""
    write = GraphWriter(graph)
    x = graph.inputs[0]
    (epsilon,) = graph.outputs
    epsilon.name = "guidance.samples"  # the graph's output takes over its name
    shape = write.constant("guidance.shape", np.array([2, -1, *list(x.shape or ())[1:]], dtype=np.int64))
    halves = write.node("Reshape", [epsilon, shape], "guidance.halves")  # (2N, C, H, W) -> (2, N, C, H, W)
    without, with_condition = (
        write.node("Gather", [halves, write.constant(f"guidance.{name}.half", np.int64(i))], f"guidance.{name}")
        for i, name in enumerate(("unconditional", "conditional"))
    )
    factor = scale
    if step_per_image:  # (N,) -> (N, 1, 1, 1), so that it broadcasts over an image
        wide = write.constant("guidance.wide", np.array([-1, 1, 1, 1], dtype=np.int64))
        factor = write.node("Reshape", [scale, wide], "guidance.factor")
    difference = write.node("Sub", [with_condition, without], "guidance.difference")
    away = write.node("Mul", [difference, factor], "guidance.away")
    guided = write.node("Add", [without, away], "eps")
    write.append()
    guided.shape = ir.Shape(x.shape or ())
    graph.outputs[:] = [guided]
