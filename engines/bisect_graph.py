"""Which node of a graph a builder cannot take: bisection over the beginnings of the graph."""

from collections.abc import Callable

import onnx

_CODES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN)


def first_failing_node(model: onnx.ModelProto, builds: Callable[[onnx.ModelProto], bool]) -> onnx.NodeProto:
    """Return the node whose arrival makes the beginning of the graph fail.

    Args:
        model: a checked graph that does not build, every node named.
        builds: tells whether a graph does; asked some log2(nodes) times.
    """
    model = onnx.shape_inference.infer_shapes(model)
    ends = _computed(model)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        beginning = graph_up_to(model, ends[middle])
        if beginning is None or builds(beginning):
            low = middle + 1
        else:
            high = middle
    found: onnx.NodeProto = model.graph.node[ends[high]]
    return found


def graph_up_to(model: onnx.ModelProto, last: int) -> onnx.ModelProto | None:
    """Return the graph up to and with node number `last`, its outputs what the rest reads; None if that is nothing.

    Where the rest reads codes, the outputs are what those were rounded from: not every runtime hands codes out.
    """
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    made = {name: model.graph.node[i] for i in _computed(model) if i <= last for name in model.graph.node[i].output}
    read = {name for node in model.graph.node[last + 1 :] for name in node.input}
    read |= {value.name for value in model.graph.output}
    outputs = set()
    for name in made.keys() & read:
        while name in made and kinds.get(name, onnx.TensorProto.INT8) in _CODES:
            name = made[name].input[0]
        outputs |= {name} & made.keys()
    if not outputs:
        return None
    inputs = [value.name for value in model.graph.input]
    part: onnx.ModelProto = onnx.utils.Extractor(model).extract_model(inputs, sorted(outputs))
    return part


def _computed(model: onnx.ModelProto) -> list[int]:
    """Return the numbers of the nodes that depend on an input; the others are part of what reads them."""
    known, numbers = {value.name for value in model.graph.input}, []
    known -= {tensor.name for tensor in model.graph.initializer}
    for i, node in enumerate(model.graph.node):  # in topological order, as ONNX requires
        if known & set(node.input):
            known.update(node.output)
            numbers.append(i)
    return numbers
