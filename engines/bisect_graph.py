"""Find the node of a graph that a builder cannot take, by building ever shorter beginnings of the graph.

Needed because TensorRT's builder may crash without naming the node (a scale that is looked up in a table, for one).
In: a graph that does not build. Out: the first node with which its beginning does not.
"""

from collections.abc import Callable

import onnx

_CODES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN)


def first_failing_node(model: onnx.ModelProto, builds: Callable[[onnx.ModelProto], bool]) -> onnx.NodeProto:
    """Return the node such that the graph builds up to it, and not with it.

    Args:
        model: A checked graph that does not build, every node named.
        builds: Returns whether a graph builds; called about log2(nodes) times.
    """
    model = onnx.shape_inference.infer_shapes(model)
    ends = _computed(model)
    low = 0
    high = len(ends) - 1
    # Invariant: the beginning up to ends[high] fails, every one before ends[low] builds (or computes nothing).
    while low < high:
        middle = (low + high) // 2
        beginning = graph_up_to(model, ends[middle])
        if beginning is None or builds(beginning):
            low = middle + 1
        else:
            high = middle
    node: onnx.NodeProto = model.graph.node[ends[high]]
    return node


def graph_up_to(model: onnx.ModelProto, last: int) -> onnx.ModelProto | None:
    """Return the graph up to and including node number `last`; its outputs are the values that later nodes read.

    Where a later node reads integer codes, the output is the float that they were rounded from: not every runtime can
    return codes. None if no later node reads anything.
    """
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    made = {name: model.graph.node[i] for i in _computed(model) if i <= last for name in model.graph.node[i].output}
    read = {name for node in model.graph.node[last + 1 :] for name in node.input}
    read |= {value.name for value in model.graph.output}
    outputs = set()
    for name in made.keys() & read:
        while name in made and kinds.get(name, onnx.TensorProto.INT8) in _CODES:
            name = made[name].input[0]  # from DequantizeLinear's or Cast's input back to the first float
        outputs |= {name} & made.keys()
    if not outputs:
        return None
    inputs = [value.name for value in model.graph.input]
    part: onnx.ModelProto = onnx.utils.Extractor(model).extract_model(inputs, sorted(outputs))
    return part


def _computed(model: onnx.ModelProto) -> list[int]:
    """Return the numbers of the nodes that depend on an input.

    The others compute constants (a weight after DequantizeLinear) and belong to the layer that reads them: alone they
    would be a graph without computation, which builds whatever they are.
    """
    known = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    numbers = []
    for i, node in enumerate(model.graph.node):  # in topological order, as ONNX requires
        if known & set(node.input):
            known.update(node.output)
            numbers.append(i)
    return numbers
