"""Adding nodes and constants to an ONNX graph, every name used once."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class GraphWriter:
    """Makes new nodes, which are `pending` until it is said where they go.

    Args:
        graph: what is written to.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.pending: list[ir.Node] = []
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        self._names = {str(named.name) for named in (*graph, *values)}

    def constant(self, name: str, array: npt.NDArray[np.generic] | np.generic) -> ir.Value:
        """Register a constant."""
        name = self._unique(name)
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
        made = ir.node(op, inputs, attributes=attributes or {}, num_outputs=1, name=self._unique(f"{name}.{op}"))
        out = made.outputs[0]
        out.name, out.type = self._unique(name), ir.TensorType(kind)
        self.pending.append(made)
        return out

    def insert_before(self, node: ir.Node) -> None:
        """Put the new nodes before `node`."""
        self.graph.insert_before(node, self.pending)
        self.pending = []

    def insert_after(self, node: ir.Node) -> None:
        """Put the new nodes behind `node`."""
        self.graph.insert_after(node, self.pending)
        self.pending = []

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Put the new nodes, of which `result` is the output, in the place of `node`."""
        result.shape = node.outputs[0].shape
        self.insert_before(node)
        ir.convenience.replace_all_uses_with(node.outputs[0], result)
        self.graph.remove(node, safe=True)

    def append(self) -> None:
        """Put the new nodes at the end."""
        self.graph.extend(self.pending)
        self.pending = []

    def _unique(self, name: str) -> str:
        """A layer called twice is written twice."""
        candidate, n = name, 1
        while candidate in self._names:
            n += 1
            candidate = f"{name}.{n}"
        self._names.add(candidate)
        return candidate
