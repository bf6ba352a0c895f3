"""Write a plan into a float ONNX graph: Q/DQ on the inputs of every quantized layer, its weight as integers.

Nodes are matched by the module scope that the exporter records on each of them, not by weight names: bias-free
linears lose theirs (their weight is transposed and renamed). The original weight is never read; the plan's codes take
its place, so the file holds what was calibrated. The pass raises unless it rewrote every layer of the plan.

A layer with a scale for each step is written as x / r -> Q -> DQ -> * r, where r = Gather(table, t) is the step's scale
over the widest one: Q itself keeps a constant scale, because runtimes take no other. That computes the right thing
everywhere, but the multiplication between DQ and the layer keeps the layer's arithmetic in float; behind the layer it
would not.
"""

import ast
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calib.affine import integer_range
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan
from calib.ranges import nearest_step
from gaq_export.errors import GaqError
from gaq_export.profiles import QdqProfile

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = ("Conv", "Gemm", "MatMul")
EXTERNAL_BYTES = 1_900_000_000  # protobuf holds less than 2 GB


def insert_qdq(model: ir.Model, plan: QuantPlan, profile: QdqProfile) -> ir.Model:
    """Rewrite `model` in place and return it.

    Args:
        model: float graph from `export_float`.
        plan: integer weights and scales by module name.
        profile: the target's wishes.

    Raises:
        GaqError: some layer of the plan has no node in the graph, or the target cannot take what the plan has.
    """
    if plan.products and not profile.unsigned_products:
        raise GaqError(
            "This plan quantizes the products inside attention with unsigned codes, which TensorRT does not take. "
            "Calibrate with --convention deploy, or use OpenVINO or ONNX Runtime."
        )
    steps = None if plan.timesteps is None else nearest_step(plan.timesteps, torch.arange(plan.num_train))
    writer = _Writer(model.graph, profile, steps)
    rewritten = set()
    for node in list(model.graph):
        name = _module_of(node)
        layer = plan.layers.get(name) if node.op_type in _WEIGHTED else None
        product = plan.products.get(name) if node.op_type == "MatMul" and _in_attention(node) else None
        if layer is not None and _constant_weight(node):
            writer.rewrite(node, name, layer)
            rewritten.add(name)
        elif product is not None:
            writer.rewrite_product(node, name, product)
            rewritten.add(name)
    wanted = plan.layers.keys() | plan.products.keys()
    missing = sorted(wanted - rewritten)
    if missing:
        raise GaqError(
            f"{len(missing)} of {len(wanted)} quantized layers are not in the exported graph (first: "
            f"{missing[0]!r}): the plan belongs to another model, or the exporter has changed its metadata."
        )
    RemoveUnusedNodesPass()(model)
    return model


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, whole or not at all; weights beyond protobuf's 2 GB go to `path`.data beside it."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, temporary, external_data=f"{path.name}.data" if size > EXTERNAL_BYTES else None)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise GaqError(f"Cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error


def _module_of(node: ir.Node) -> str:
    """Return the name of the module whose forward made `node`, "" if unknown."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _in_attention(node: ir.Node) -> bool:
    """Tell whether `node` is a part of a `scaled_dot_product_attention`, which the exporter takes to pieces."""
    return "'scaled_dot_product_attention" in node.metadata_props.get(_SCOPES, "")


def _constant_weight(node: ir.Node) -> bool:
    """Tell a layer's weight from a product of two activations in the same module."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value is not None and value.const_value is not None


@dataclass
class _Writer:
    """Adds nodes and initializers to one graph; Q/DQ of an input is shared by the layers that read it (q, k, v)."""

    graph: ir.Graph
    profile: QdqProfile
    steps: torch.Tensor | None  # (num_train,): which of the plan's steps each timestep takes its ranges from
    _shared: dict[tuple[ir.Value, float, int, bytes], ir.Value] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def rewrite(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        source = node.inputs[0]
        assert source is not None
        grid = layer.input
        key = (source, grid.scale, grid.bits, b"" if grid.ratio is None else grid.ratio.numpy().tobytes())
        new: list[ir.Node] = []
        if key not in self._shared:
            self._shared[key] = self._input(node, 0, f"{name}.input", grid, new)
        node.replace_input_with(0, self._shared[key])
        node.replace_input_with(1, self._weight(node, name, layer, new))
        self.graph.insert_before(node, new)
        if self.profile.quantize_outputs and node.op_type in ("Conv", "Gemm"):
            self._output(node, name, layer)

    def rewrite_product(self, node: ir.Node, name: str, product: ProductQuant) -> None:
        """Quantize both factors of q k^T, or of the product of its softmax with v."""
        left = node.inputs[0]
        producer = left.producer() if left is not None else None
        second = producer is not None and producer.op_type == "Softmax"
        new: list[ir.Node] = []
        for i, operand in enumerate(("probability", "value") if second else ("query", "key")):
            node.replace_input_with(i, self._input(node, i, f"{name}.{operand}", getattr(product, operand), new))
        self.graph.insert_before(node, new)

    def _input(self, node: ir.Node, index: int, name: str, grid: Grid, new: list[ir.Node]) -> ir.Value:
        """Return an input of `node`, quantized and dequantized."""
        source, shape = node.inputs[index], node.outputs[0].shape  # whose rank is the input's
        assert source is not None
        assert shape is not None
        if grid.ratio is None:
            return self._activation(source, name, grid, new)
        assert self.steps is not None
        table = grid.ratio[self.steps].reshape(-1, *[1] * (len(shape) - 1))  # (num_train, 1, ...)
        ratios, t = self._constant(f"{name}.ratios", table.numpy()), self.graph.inputs[1]
        ratio = self._node("Gather", [ratios, t], f"{name}.ratio", ir.DataType.FLOAT, new)  # (N, 1, ...)
        divided = self._node("Div", [source, ratio], f"{name}.divided", ir.DataType.FLOAT, new)
        rounded = self._activation(divided, name, grid, new)
        return self._node("Mul", [rounded, ratio], f"{name}.multiplied", ir.DataType.FLOAT, new)

    def _output(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        out, new = node.outputs[0], list[ir.Node]()
        result = self._activation(out, f"{name}.output", Grid(scale=layer.output_scale, bits=8), new)
        ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
        new[0].replace_input_with(0, out)  # the quantizer itself still reads the layer
        self.graph.insert_after(node, new)

    def _activation(self, value: ir.Value, name: str, grid: Grid, new: list[ir.Node]) -> ir.Value:
        """Quantize and dequantize `value`; narrower grids are an 8-bit one behind a Clip."""
        if grid.bits < 8:
            low, high = (np.float32(code * np.float32(grid.scale)) for code in integer_range(grid.bits))
            bounds = [self._constant(f"{name}.low", low), self._constant(f"{name}.high", high)]
            value = self._node("Clip", [value, *bounds], f"{name}.clipped", ir.DataType.FLOAT, new)
        zero = np.int8(0) if grid.signed and not self.profile.unsigned else np.uint8(128 if grid.signed else 0)
        parameters = [self._constant(f"{name}.scale", np.float32(grid.scale)), self._constant(f"{name}.zero", zero)]
        kind = ir.DataType.UINT8 if zero.dtype == np.uint8 else ir.DataType.INT8
        q = self._node("QuantizeLinear", [value, *parameters], f"{name}.q", kind, new)
        return self._node("DequantizeLinear", [q, *parameters], f"{name}.dq", ir.DataType.FLOAT, new)

    def _weight(self, node: ir.Node, name: str, layer: LayerQuant, new: list[ir.Node]) -> ir.Value:
        codes, axis = _oriented(node, layer.codes.numpy())
        scale = self._constant(f"{name}.weight_scale", layer.weight_scale.numpy())
        form = self.profile.int4 if layer.weight_bits <= 4 else "expand"
        if form == "expand":
            value = self._constant(f"{name}.weight_int8", codes)
        else:
            value = self._constant(f"{name}.weight_int4", codes.astype(ml_dtypes.int4))
        if form == "cast":
            one = self._constant(f"{name}.one", np.float32(1))
            value = self._node("DequantizeLinear", [value, one], f"{name}.unpacked", ir.DataType.FLOAT, new)
            to = {"to": int(ir.DataType.INT8)}
            value = self._node("Cast", [value], f"{name}.int8", ir.DataType.INT8, new, to)
        attributes = {"axis": axis}
        return self._node("DequantizeLinear", [value, scale], f"{name}.dequantized", ir.DataType.FLOAT, new, attributes)

    def _constant(self, name: str, array: npt.NDArray[np.generic] | np.generic) -> ir.Value:
        name = self._unique(name)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)  # type: ignore[arg-type]
        self.graph.register_initializer(value)
        return value

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        kind: ir.DataType,
        new: list[ir.Node],
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or {}, num_outputs=1, name=self._unique(f"{name}.{op}"))
        out = node.outputs[0]
        out.name, out.type = self._unique(name), ir.TensorType(kind)
        new.append(node)
        return out

    def _unique(self, name: str) -> str:
        """A layer called twice is written twice."""
        candidate, n = name, 1
        while candidate in self._names:
            n += 1
            candidate = f"{name}.{n}"
        self._names.add(candidate)
        return candidate


def _oriented(node: ir.Node, codes: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int8], int]:
    """Return the codes as `node` wants its weight, and their channel axis: a MatMul's weight is (in, out)."""
    transposed = node.attributes.get("transB")
    if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed is not None and transposed.as_int() == 1):
        return codes, 0
    return np.ascontiguousarray(codes.T), 1
