"""The float network as an ONNX graph: inputs `x` (batch, C, H, W) and `t` (batch,), output `eps`, opset 21.

The plain network is exported, never the fake-quantized one: Q/DQ comes afterwards (`graph.qdq`), straight from
the plan's integers. Opset 21 is the first with INT4 and with per-channel GroupNormalization.

Attention is written plainly, two products around a softmax, since runtimes know it by that form; the exporter's own
takes the keys through three dimensions to transpose them.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib.data import NO_CONDITION, example_inputs
from calib.silence import silenced
from gaq_export.errors import GaqError

OPSET = 21
_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter records the modules that made a node
EXAMPLE_BATCH = 2


def export_float(
    network: nn.Module, shape: tuple[int, ...], condition: Mapping[str, Tensor] = NO_CONDITION
) -> ir.Model:
    """Return the float graph of `network`.

    Args:
        network: in eval mode, called as (x, t), or (x, t, cond); its layers' names end up in the nodes' metadata.
        shape: of an image, (C, H, W).
        condition: a row, (1, ...), of each thing in `cond`; they become inputs of their names, after `x` and `t`.

    Raises:
        GaqError: torch cannot export it, or the batch did not stay dynamic.
    """
    inputs = example_inputs(EXAMPLE_BATCH, shape, 0, {name: condition[name] for name in sorted(condition)})
    # Without the last, a mapping before it is taken for keywords.
    return _export(network, (*inputs, {}), inputs, ["x", "t", *sorted(condition)], ["eps"])


def export_submodel(network: nn.Module, name: str, row: Tensor, outputs: Sequence[str]) -> ir.Model:
    """Return the float graph of a network of one input, which is what stands before or behind the denoiser.

    Args:
        network: in eval mode, called as (input,); gives a tensor, or as many as there are `outputs`.
        name: of the input.
        row: one of it, (1, ...).
        outputs: names.

    Raises:
        GaqError: as `export_float`.
    """
    inputs = (torch.cat([row] * EXAMPLE_BATCH),)
    return _export(network, inputs, inputs, [name], outputs)


def module_of(node: ir.Node) -> str:
    """Return the name of the module whose forward made `node`, "" if unknown."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def in_attention(node: ir.Node) -> bool:
    """Tell whether `node` is a part of a `scaled_dot_product_attention`, which the exporter takes to pieces."""
    return "'scaled_dot_product_attention" in node.metadata_props.get(_SCOPES, "")


def _export(
    network: nn.Module, args: tuple[Any, ...], inputs: tuple[Any, ...], names: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Export what is called with `args`, of which the first are `inputs`, their first dimension the batch."""
    # The graph takes any batch; the bound is where diffusers' up-sampling branches, at which torch would trace again.
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
    except Exception as error:  # the exporter raises many kinds; all mean the same to a user
        reason = str(error).strip().splitlines()
        raise GaqError(f"torch cannot export this network to ONNX: {reason[0] if reason else error!r}") from error
    assert program is not None
    model = program.model
    for node in model.graph:  # it names files of this machine
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    _skip_slices(model.graph)
    first = model.graph.inputs[0].shape
    if first is None or isinstance(first[0], int):
        raise GaqError(f"The exported graph fixed its batch at {first and first[0]}: the network's code depends on it.")
    return model


def _skip_slices(graph: ir.Graph) -> None:
    """Read a part of a concatenation where it comes from, instead of cutting it out again."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Slice" else None
        joined = source.producer() if source is not None else None
        if joined is None or joined.op_type != "Concat" or joined.attributes["axis"].as_int() != 1:
            continue
        bounds = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
        if len(bounds) != len(node.inputs) - 1 or [b.tolist() for b in bounds[2:]] not in ([[1]], [[1], [1]]):
            continue
        end = 0
        for part in joined.inputs:
            size = part.shape[1] if part is not None and part.shape is not None else None
            if part is None or not isinstance(size, int):
                break
            begin, end = end, end + size
            last = int(bounds[1][0])
            if int(bounds[0][0]) == begin and (last == end or (part is joined.inputs[-1] and last > end)):
                ir.convenience.replace_all_uses_with(node.outputs[0], part)
                graph.remove(node, safe=True)
                break


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
    """Write softmax(scale q k^T + mask) v, all of them (N, heads, L, D); called by the exporter as it traces."""
    if is_causal or enable_gqa:
        raise NotImplementedError("attention that is causal, or whose queries outnumber the keys' heads")
    scaled = op.Mul(query, op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale))
    logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        kept, hidden = (op.Constant(value_float=value) for value in (0.0, -math.inf))
        attn_mask = op.Where(attn_mask, kept, hidden)  # type: ignore[type-var]
    return op.MatMul(op.Softmax(logits if attn_mask is None else op.Add(logits, attn_mask), axis=-1), value)
