"""Add nodes and constants to an ONNX graph under names that no other has.

Every rewrite here has the same two steps: make nodes, which are pending, then say where they go. ONNX wants nodes in
topological order, so the place matters.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class GraphWriter:
    """Makes new nodes for a graph; they are `pending` until one of the methods puts them somewhere.

    Args:
        graph: the graph to write to.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.pending: list[ir.Node] = []
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        self._names = {str(named.name) for named in (*graph, *values)}

    def constant(self, name: str, array: npt.NDArray[np.generic] | np.generic) -> ir.Value:
        """Add a constant to the graph and return it."""
        name = self._unique(name)
        # np.ascontiguousarray makes a vector of a scalar; the shape is put back.
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
        shape = ir.Shape(np.shape(array))
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        kind: ir.DataType = ir.DataType.FLOAT,
        attributes: Mapping[str, int | Sequence[int]] | None = None,
    ) -> ir.Value:
        """Make a node with one output of element type `kind`, and return that output."""
        node = ir.node(op, inputs, attributes=attributes or {}, num_outputs=1, name=self._unique(f"{name}.{op}"))
        out = node.outputs[0]
        out.name = self._unique(name)
        out.type = ir.TensorType(kind)
        self.pending.append(node)
        return out

    def insert_before(self, node: ir.Node) -> None:
        """Put the pending nodes before `node`."""
        self.graph.insert_before(node, self.pending)
        self.pending = []

    def insert_after(self, node: ir.Node) -> None:
        """Put the pending nodes after `node`."""
        self.graph.insert_after(node, self.pending)
        self.pending = []

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Put the pending nodes in the place of `node`; who read its output reads `result`, of the same shape."""
        result.shape = node.outputs[0].shape
        self.insert_before(node)
        ir.convenience.replace_all_uses_with(node.outputs[0], result)
        self.graph.remove(node, safe=True)

    def append(self) -> None:
        """Put the pending nodes at the end of the graph."""
        self.graph.extend(self.pending)
        self.pending = []

    def _unique(self, name: str) -> str:
        """Return `name`, numbered if it is taken: a layer that is called twice is written twice."""
        candidate, n = name, 1
        while candidate in self._names:
            n += 1
            candidate = f"{name}.{n}"
        self._names.add(candidate)
        return candidate
