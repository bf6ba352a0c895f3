"""Turn the floats of a graph into 16 bits, because a strongly typed runtime multiplies in the type the graph says.

In: a float32 graph, quantized or not. Out: the same graph with the network's floats, its quantization scales among
them, in FP16 or BF16, and Casts where they meet the rest. Three parts stay float32: what depends on the timestep alone
(sines of large numbers), the input and the predicted noise, and the sampler's update, since an image is the sum of many
small steps.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from engines.base import Compute
from gaq_export.errors import GaqError
from gaq_export.graph.time_tables import dependencies
from gaq_export.graph.writer import GraphWriter

# The types that an ONNX graph and NumPy call by these names.
_ONNX = {Compute.FLOAT16: ir.DataType.FLOAT16, Compute.BFLOAT16: ir.DataType.BFLOAT16}
_NUMPY: dict[Compute, npt.DTypeLike] = {Compute.FLOAT16: np.float16, Compute.BFLOAT16: ml_dtypes.bfloat16}
_UPDATE = "update."  # how the names of the update's nodes begin, see `graph.step`
_ALWAYS_FLOAT32 = (("Resize", 1), ("Resize", 2))  # (operator, input): region and scales, float32 by ONNX's definition


def compute_in(model: ir.Model, compute: str) -> ir.Model:
    """Make the network inside `model` compute in another type, in place, and return the model.

    Args:
        model: float32 graph of either kind, quantized or not.
        compute: one of `engines.Compute`, by name.

    Raises:
        GaqError: `compute` is unknown, or FP16 cannot hold a constant.
    """
    if compute not in tuple(Compute):
        raise GaqError(f"Unknown compute type {compute!r}. Choose one of {[str(known) for known in Compute]}.")
    if compute == Compute.FLOAT32:
        return model
    target = Compute(compute)
    inside = _network(model.graph)
    _convert_constants(model.graph, inside, target)
    for node in inside:
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.FLOAT:  # of a Cast
            node.attributes["to"] = ir.AttrInt64("to", int(_ONNX[target]))
        for out in node.outputs:
            if _is_float(out):
                out.type = ir.TensorType(_ONNX[target])
    _cast_at_border(model.graph, inside, _ONNX[target])
    return model


def _network(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that are to compute in 16 bits: those that depend on x, but the update, and their constants."""
    depends = dependencies(graph)
    inside = set[ir.Node]()
    for node in reversed(graph):  # readers first: a node on constants alone (a weight's Q/DQ) goes with its readers
        on = depends[node.outputs[0]]
        readers = (user for out in node.outputs for user, _ in out.uses())
        in_network = graph.inputs[0] in on or (not on and any(user in inside for user in readers))
        if in_network and not str(node.name).startswith(_UPDATE):
            inside.add(node)
    return inside


def _convert_constants(graph: ir.Graph, inside: set[ir.Node], compute: Compute) -> None:
    """Turn the float constants that nodes of `inside` read into 16 bits."""
    for value in graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        used = [user in inside and (user.op_type, index) not in _ALWAYS_FLOAT32 for user, index in value.uses()]
        if tensor.dtype != ir.DataType.FLOAT or not any(used):
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(_NUMPY[compute])
        back = narrow.astype(np.float32)
        # Overflow to infinity, or a scale that becomes 0, would ruin the image without an error anywhere.
        if not np.isfinite(back).all() or (str(value.name).endswith("scale") and not back.all()):
            raise GaqError(f"{compute} cannot hold {value.name!r} (largest {np.abs(wide).max():g}): use float32.")
        value.const_value = ir.tensor(narrow, name=value.name)
        value.type = ir.TensorType(_ONNX[compute])


def _cast_at_border(graph: ir.Graph, inside: set[ir.Node], kind: ir.DataType) -> None:
    """Put a Cast on every float value that a node of `inside` reads from outside, or the other way round.

    In: value -> readers. Out: value -> Cast -> those readers that are on the other side of the border.
    """
    write = GraphWriter(graph)
    wide = {value for value in graph.inputs if _is_float(value)}
    wide |= {out for node in graph if node not in inside for out in node.outputs if _is_float(out)}
    narrow = {out for node in inside for out in node.outputs if out.type == ir.TensorType(kind)}
    for value in wide | narrow:
        across = [(user, index) for user, index in value.uses() if (user in inside) == (value in wide)]
        leaves = value in narrow and value in graph.outputs
        if not across and not leaves:
            continue
        to = kind if value in wide else ir.DataType.FLOAT
        producer = value.producer()
        cast = write.node("Cast", [value], f"half.{value.name}", to, {"to": int(to)})
        for user, index in across:
            user.replace_input_with(index, cast)
        if leaves:  # the Cast's output becomes the graph's, under the same name
            graph.outputs[list(graph.outputs).index(value)] = cast
            cast.name, value.name, cast.shape = value.name, cast.name, value.shape
        if producer is None:
            write.insert_before(graph[0])
        else:
            write.insert_after(producer)


def _is_float(value: ir.Value) -> bool:
    return value.type == ir.TensorType(ir.DataType.FLOAT)
