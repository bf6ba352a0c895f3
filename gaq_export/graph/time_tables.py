"""Replace what depends on the timestep alone by time tables, looked up by the index of the step.

In: a float graph with the timestep t (N,) as its second input. Out: the same graph with `step` (1,) in its place.

    t -> sines -> layers -> v (N, E) -> rest    becomes    Gather(table (S, E), step) (1, E) -> rest

A U-Net's time embedding and its projections in every block depend on t and on no other input, so a graph for known
steps needs no layers for them: their outputs are computed once, in float64. That removes the cost of the layers, their
weights and their quantization error. Which values depend on t alone is read from the graph's edges, never from names.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gaq_export.errors import GaqError, one_line
from gaq_export.graph.export import module_of
from gaq_export.graph.float64 import to_float64
from gaq_export.graph.qdq import WEIGHTED
from gaq_export.graph.writer import GraphWriter

_OTHERWISE = "Build with --graph eps."
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")  # here one row, (1, ...), broadcasts over a batch, (N, ...)


def make_time_tables(model: ir.Model, visited: torch.Tensor) -> frozenset[str]:
    """Replace the input `t` (N,) of a float graph by `step` (1,), the index of a sampling step, in place.

    Args:
        model: graph from `export_float`.
        visited: timesteps of the steps, (S,) int64.

    Returns:
        Names of the modules whose layers are tables now.

    Raises:
        GaqError: a value computed from t alone is not a float tensor with a row for each sample, or is read by an
            operator that cannot take one row for a whole batch.
    """
    graph = model.graph
    x, t, *_ = graph.inputs
    depends = dependencies(graph)
    # The last values that depend on t alone: those that a node reads which depends on something else too.
    frontier = [
        value
        for value, on in depends.items()
        if on == {t} and any(depends[user.outputs[0]] > {t} for user, _ in value.uses())
    ]
    temporal = [node for node in graph if depends[node.outputs[0]] == {t}]
    step = ir.Value(name="step", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    for value, table in zip(frontier, _evaluate(graph, frontier, depends, visited), strict=True):
        _look_up(graph, value, table, step)
    graph.inputs[1] = step
    baked = frozenset(module_of(node) for node in temporal if node.op_type in WEIGHTED)
    RemoveUnusedNodesPass()(model)
    # Networks may still read the batch size from t's shape; x has as many rows.
    for user, index in list(t.uses()):
        if (user.op_type, user.attributes.get_int("end", 2)) != ("Shape", 1):
            raise GaqError(f"The network uses its timesteps in a way that has no table ({user.op_type}). {_OTHERWISE}")
        user.replace_input_with(index, x)
    return baked


def dependencies(graph: ir.Graph) -> dict[ir.Value, set[ir.Value]]:
    """Return which of the graph's inputs each value depends on.

    The shape of an input is known before it is run, and so counts as depending on none.
    """
    depends: dict[ir.Value, set[ir.Value]] = {value: {value} for value in graph.inputs}
    for node in graph:
        known = node.op_type == "Shape" and node.inputs[0] in graph.inputs
        on = set[ir.Value]().union(*(depends.get(value, ()) for value in node.inputs if value is not None))
        depends |= {out: set() if known else on for out in node.outputs}
    return depends


def _evaluate(
    graph: ir.Graph, wanted: Sequence[ir.Value], depends: dict[ir.Value, set[ir.Value]], visited: torch.Tensor
) -> list[npt.NDArray[np.float32]]:
    """Return each of `wanted` at all steps, (S, ...): computed in float64, rounded to float32 once."""
    if not wanted:  # a network that ignores its timesteps
        return []
    # The part of the graph from t to `wanted`, fed with all S timesteps as one batch. Shapes that it takes from inputs
    # (of x, or of t) become inputs of that part, since x itself is not there.
    shapes = {node.outputs[0]: node for node in graph if node.op_type == "Shape" and node.inputs[0] in graph.inputs}
    part = ir.convenience.extract(graph, [graph.inputs[1], *shapes], wanted)
    feeds: dict[str, npt.NDArray[np.int64]] = {str(graph.inputs[1].name): visited.numpy()}
    for value, node in shapes.items():
        assert node.inputs[0] is not None
        full = [len(visited), *list(node.inputs[0].shape or ())[1:]]  # the batch is S here
        start, end = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", len(full))))
        feeds[str(value.name)] = np.array(full[start:end], dtype=np.int64)
    names = [value.name for value in part.inputs]
    whole = ir.external_data.load_to_model(ir.Model(part, ir_version=10))  # where weights lie beside the graph
    evaluator = ReferenceEvaluator(to_float64(ir.to_proto(whole)))
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            tables = evaluator.run(None, {name: feed for name, feed in feeds.items() if name in names})
    except Exception as error:  # whatever NumPy or the evaluator raises for an operator that it does not take
        raise GaqError(
            f"What the network computes from its timesteps alone cannot be tabulated ({one_line(error)}). {_OTHERWISE}"
        ) from error
    assert isinstance(tables, list)
    for value, table in zip(wanted, tables, strict=True):
        if table.dtype != np.float64 or table.shape[:1] != (len(visited),):
            raise GaqError(
                f"The network computes {value.name!r} from its timesteps alone, {table.dtype} of shape {table.shape}; "
                f"only floats with a row for each of {len(visited)} timesteps can be tabulated. {_OTHERWISE}"
            )
        broken = visited[torch.from_numpy(~np.isfinite(table).reshape(len(table), -1).all(1))]
        if len(broken):
            raise GaqError(
                f"The network computes NaN or infinite numbers from timestep {int(broken[0])} alone; at 0 a logarithm "
                "(a Fourier embedding) has no value. Choose steps without that timestep, such as --spacing from-1."
            )
    return [table.astype(np.float32) for table in tables]


def _look_up(graph: ir.Graph, value: ir.Value, table: npt.NDArray[np.float32], step: ir.Value) -> None:
    """Make every reader of `value` (N, ...) read the row `step` (1,) of `table` (S, ...) instead, (1, ...)."""
    write = GraphWriter(graph)
    rows = write.constant(f"temporal.{value.name}.rows", table)
    row = write.node("Gather", [rows, step], f"temporal.{value.name}.row")
    write.insert_before(graph[0])
    for user, index in list(value.uses()):
        if user.op_type not in _ELEMENTWISE:
            raise GaqError(
                f"The network uses {value.name!r}, computed from its timesteps alone, in {user.op_type}; only "
                f"{', '.join(_ELEMENTWISE)} can take one row for a whole batch. {_OTHERWISE}"
            )
        user.replace_input_with(index, row)
