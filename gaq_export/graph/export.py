"""Export a float network as an ONNX graph: inputs `x` (batch, C, H, W) and `t` (batch,), output `eps`, opset 21.

The plain network is exported, never the fake-quantized one: Q/DQ comes afterwards (`graph.qdq`), straight from the
plan's integers. Opset 21 is the first with INT4 and with a GroupNormalization whose scale is for each channel.

Attention is written as two products around a softmax, the form in which runtimes recognise it; the exporter's own form
reshapes the keys to three dimensions in order to transpose them.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from calib.data import NO_CONDITION, example_inputs
from calib.silence import silenced
from gaq_export.errors import GaqError, one_line
from gaq_export.graph.circular import unroll_circular_pads

OPSET = 21
_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata in which the exporter records the modules around a node
EXAMPLE_BATCH = 2  # torch takes a batch of 1 for a constant


def export_float(
    network: nn.Module, shape: tuple[int, ...], condition: Mapping[str, Tensor] = NO_CONDITION
) -> ir.Model:
    """Return the float graph of `network`.

    Args:
        network: in eval mode, called as (x, t), or (x, t, cond); the names of its layers are stored with the nodes.
        shape: (C, H, W) of an image.
        condition: one row, (1, ...), of each tensor in `cond`; these become inputs by their names, after `x` and `t`.

    Raises:
        GaqError: torch cannot export it, or the batch did not stay dynamic.
    """
    inputs = example_inputs(EXAMPLE_BATCH, shape, 0, {name: condition[name] for name in sorted(condition)})
    # torch takes a mapping in the last place for keyword arguments, so an empty one goes behind `cond`.
    return _export(network, (*inputs, {}), inputs, ["x", "t", *sorted(condition)], ["eps"])


def export_submodel(network: nn.Module, name: str, row: Tensor, outputs: Sequence[str]) -> ir.Model:
    """Return the float graph of a network with one input: a latent decoder or a text encoder.

    Args:
        network: in eval mode, called as (input,); returns a tensor, or a tuple of as many as there are `outputs`.
        name: name of the input.
        row: example of one row of it, (1, ...).
        outputs: names of the outputs.

    Raises:
        GaqError: as `export_float`.
    """
    inputs = (torch.cat([row] * EXAMPLE_BATCH),)
    return _export(network, inputs, inputs, [name], outputs)


def module_of(node: ir.Node) -> str:
    """Return the name of the module whose forward made `node`, "" if it is unknown."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""  # the last scope is the operation itself


def in_attention(node: ir.Node) -> bool:
    """Return whether `node` is part of a `scaled_dot_product_attention`, which the exporter decomposes."""
    return "'scaled_dot_product_attention" in node.metadata_props.get(_SCOPES, "")


def _export(
    network: nn.Module, args: tuple[Any, ...], inputs: tuple[Any, ...], names: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Export a network that is called with `args`, which begin with `inputs`; the first dimension is the batch."""
    # The graph takes any batch; up to this bound diffusers' up-sampling takes the same branch, so one trace serves.
    batch = torch.export.Dim("batch", max=63)
    try:
        with silenced("torch.onnx"):  # notes about absent optional packages
            program = torch.onnx.export(
                network,
                args,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=pytree.tree_map(lambda _: {0: batch}, inputs),
                input_names=names,
                output_names=outputs,
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types; all of them mean the same to a user
        raise GaqError(f"torch cannot export this network to ONNX: {_reason(error)}.") from error
    assert program is not None
    model = program.model
    for node in model.graph:  # stack traces name files of this machine, and would make graphs of two machines differ
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    _name_once(model.graph, network)
    _skip_slices(model.graph)
    unroll_circular_pads(model.graph)
    first = model.graph.inputs[0].shape
    if first is None or isinstance(first[0], int):
        raise GaqError(f"The exported graph fixed its batch at {first and first[0]}: the network's code depends on it.")
    return model


def _reason(error: BaseException) -> str:
    """Return why the exporter failed, in one line; its own message says only that it did."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if not isinstance(error, GuardOnDataDependentSymNode):
        return one_line(error).rstrip(". ")
    place = re.search(r'File "([^"]+)", line (\d+), in .*\n\s*(.+)', text)
    where = f" ({PurePath(place[1]).name}, line {place[2]}: {place[3].strip()[:100]})" if place else ""
    return f"its code decides by the values of its inputs{where}, and a graph has no branches; use torch.where"


def _name_once(graph: ir.Graph, network: nn.Module) -> None:
    """Record the name by which plans know it for every module, also where it was called by another name of its own."""
    modules = dict(network.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in network.named_modules()}
    others = {name: first[id(module)] for name, module in modules.items() if name != first[id(module)]}
    for node in graph if others else ():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        node.metadata_props[_SCOPES] = repr([*(others.get(scope, scope) for scope in scopes[:-1]), *scopes[-1:]])


def _skip_slices(graph: ir.Graph) -> None:
    """Remove Slices that cut out of a concatenation one of the parts that it was made of.

    In: a, b -> Concat(axis 1) -> Slice = b -> readers. Out: b -> readers. The two halves of a
    `calib.surgery.SplitConvolution` read a skip connection like this.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Slice" else None
        joined = source.producer() if source is not None else None
        if joined is None or joined.op_type != "Concat" or joined.attributes["axis"].as_int() != 1:
            continue
        # Slice's inputs after the data: starts, ends, axes and, if they are not 1, steps; all constant, of one axis.
        bounds = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
        if len(bounds) != len(node.inputs) - 1 or [b.tolist() for b in bounds[2:]] not in ([[1]], [[1], [1]]):
            continue
        part = _part_between(joined, int(bounds[0][0]), int(bounds[1][0]))
        if part is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], part)
            graph.remove(node, safe=True)


def _part_between(joined: ir.Node, start: int, stop: int) -> ir.Value | None:
    """Return the input of a Concat on axis 1 whose channels are `start` to `stop`, None if no input's are."""
    end = 0
    for part in joined.inputs:
        size = part.shape[1] if part is not None and part.shape is not None else None
        if part is None or not isinstance(size, int):
            return None
        begin = end
        end = begin + size
        # "To the end" is a very large number in a graph.
        if start == begin and (stop == end or (part is joined.inputs[-1] and stop > end)):
            return part
    return None


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write softmax(scale q k^T + mask) v; the exporter calls it for each attention, with PyTorch's arguments.

    Args:
        query: (N, heads, L, D).
        key: (N, heads, M, D).
        value: (N, heads, M, D).
        attn_mask: boolean, or added to the logits, (..., L, M).
        dropout_p: ignored, the network is in eval mode.
        is_causal: not supported.
        scale: factor of the logits, D^-0.5 by default.
        enable_gqa: not supported.
    """
    if is_causal or enable_gqa:
        raise NotImplementedError("attention that is causal, or whose queries outnumber the keys' heads")
    # The query is scaled, and not the product: (L, D) numbers instead of (L, M).
    scaled = op.Mul(query, op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale))
    logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        visible, hidden = (op.Constant(value_float=bias) for bias in (0.0, -math.inf))
        attn_mask = op.Where(attn_mask, visible, hidden)  # type: ignore[type-var]
    return op.MatMul(op.Softmax(logits if attn_mask is None else op.Add(logits, attn_mask), axis=-1), value)
