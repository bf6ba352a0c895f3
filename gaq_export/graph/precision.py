"""Compute what is not integer in 16 bits: a strongly typed runtime multiplies in whatever type the graph says.

The network's floats, its quantization scales among them, become FP16 or BF16. Three islands stay float32: what depends
on the timestep alone (sines of large numbers), the input and the predicted noise, and the sampler's update, since an
image is the sum of many small steps.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gaq_export.errors import GaqError
from gaq_export.graph.time_tables import dependencies
from gaq_export.graph.writer import GraphWriter

COMPUTE: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
FLOAT32 = "update."  # beginning of the names of the update's nodes
_SIZES = (("Resize", 1), ("Resize", 2))  # inputs that ONNX wants in float32 always
_NUMPY: dict[str, npt.DTypeLike] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def compute_in(model: ir.Model, compute: str) -> ir.Model:
    """Rewrite `model`, a graph of either kind, in place and return it.

    Args:
        model: float32, quantized or not.
        compute: a key of `COMPUTE`.

    Raises:
        GaqError: unknown `compute`, or a constant that FP16 cannot hold.
    """
    if compute not in COMPUTE:
        raise GaqError(f"Unknown compute type {compute!r}. Choose one of {list(COMPUTE)}.")
    if compute == "float32":
        return model
    graph, kind = model.graph, COMPUTE[compute]
    inside = _network(graph)
    _constants(graph, inside, compute)
    for node in inside:
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(kind))
        for out in node.outputs:
            if _is_float(out):
                out.type = ir.TensorType(kind)
    _border(graph, inside, kind)
    return model


def _network(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that are to compute in 16 bits; those of constants alone go with what reads them."""
    depends, inside = dependencies(graph), set[ir.Node]()
    for node in reversed(graph):
        on = depends[node.outputs[0]]
        readers = (user for out in node.outputs for user, _ in out.uses())
        wanted = graph.inputs[0] in on or (not on and any(user in inside for user in readers))
        if wanted and not str(node.name).startswith(FLOAT32):
            inside.add(node)
    return inside


def _constants(graph: ir.Graph, inside: set[ir.Node], compute: str) -> None:
    """Turn the float constants of the nodes `inside` into 16 bits."""
    for value in graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        used = [user in inside and (user.op_type, index) not in _SIZES for user, index in value.uses()]
        if tensor.dtype != ir.DataType.FLOAT or not any(used):
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(_NUMPY[compute])
        back = narrow.astype(np.float32)
        if not np.isfinite(back).all() or (str(value.name).endswith("scale") and not back.all()):
            raise GaqError(f"{compute} cannot hold {value.name!r} (largest {np.abs(wide).max():g}): use float32.")
        value.const_value = ir.tensor(narrow, name=value.name)
        value.type = ir.TensorType(COMPUTE[compute])


def _border(graph: ir.Graph, inside: set[ir.Node], kind: ir.DataType) -> None:
    """Cast every float on its way into the network's part of the graph, and on its way out."""
    write = GraphWriter(graph)
    wide = {value for value in graph.inputs if _is_float(value)}
    wide |= {out for node in graph if node not in inside for out in node.outputs if _is_float(out)}
    narrow = {out for node in inside for out in node.outputs if out.type == ir.TensorType(kind)}
    for value in wide | narrow:
        across = [(user, index) for user, index in value.uses() if (user in inside) == (value in wide)]
        leaves = value in narrow and value in graph.outputs
        if not across and not leaves:
            continue
        to, producer = kind if value in wide else ir.DataType.FLOAT, value.producer()
        cast = write.node("Cast", [value], f"half.{value.name}", to, {"to": int(to)})
        for user, index in across:
            user.replace_input_with(index, cast)
        if leaves:
            graph.outputs[list(graph.outputs).index(value)] = cast
            cast.name, value.name, cast.shape = value.name, cast.name, value.shape
        if producer is None:
            write.insert_before(graph[0])
        else:
            write.insert_after(producer)


def _is_float(value: ir.Value) -> bool:
    return value.type == ir.TensorType(ir.DataType.FLOAT)
