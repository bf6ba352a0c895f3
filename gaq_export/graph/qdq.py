"""Write a plan into a float ONNX graph: Q/DQ on the inputs of every quantized layer, its weight as integers.

Nodes are matched by the module scope that the exporter records on each of them, not by weight names: bias-free
linears lose theirs (their weight is transposed and renamed). The original weight is never read; the plan's codes take
its place, so the file holds what was calibrated. The pass raises unless it rewrote every layer of the plan.

Runtimes take neither a scale that is looked up nor, some of them, a zero point. So a grid of each step's own, and one
whose 0 is not in the middle, are written around a quantizer that is constant and symmetric:

    Div(ratio[step]) -> Add(scale * zero[step]) -> Q -> DQ -> layer -> Mul(ratio[step]) -> Add(bias[step])

where the bias takes back what the shift adds, and a convolution's padding is made before the shift, while it is 0.
Behind the layer, the factors leave its arithmetic in integers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from gaq_export.graph.export import in_attention, module_of
from gaq_export.graph.profiles import QdqProfile
from gaq_export.graph.writer import GraphWriter

WEIGHTED = ("Conv", "Gemm", "MatMul")
# Form of a weight to the name and type of its codes.
_WEIGHTS: dict[str, tuple[str, npt.DTypeLike]] = {
    "expand": ("int8", np.int8),
    "direct": ("int4", ml_dtypes.int4),
    "cast": ("int4", ml_dtypes.int4),
    "float8": ("float8", ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What `gaq_export.graph.step` did to a graph whose second input is the index of a step, not a timestep.

    Attributes:
        timesteps: (S,) int64, timestep of each step.
        baked: names of the modules whose layers are tables now.
        index: the value that holds that index inside the network: (1,), (N,) with a step for each image, (2N,) if
            guidance doubles those.
    """

    timesteps: torch.Tensor
    baked: frozenset[str]
    index: ir.Value


def insert_qdq(model: ir.Model, plan: QuantPlan, profile: QdqProfile, step: StepInfo | None = None) -> ir.Model:
    """Rewrite `model` in place and return it.

    Args:
        model: float graph from `export_float`, or made a step of by `make_step`.
        plan: integer weights and scales by module name.
        profile: the target's wishes.
        step: what `make_step` returned.

    Raises:
        GaqError: some layer of the plan has no node in the graph.
    """
    products = plan.products if profile.unsigned_products else {}
    visited = torch.arange(plan.num_train) if step is None else step.timesteps
    given = model.graph.inputs[1] if step is None else step.index
    rewriter = _Rewriter(
        model.graph, profile, given, None if plan.timesteps is None else nearest_step(plan.timesteps, visited)
    )
    rewritten = set()
    for node in list(model.graph):
        name = module_of(node)
        layer = plan.layers.get(name) if node.op_type in WEIGHTED else None
        if layer is not None and profile.float8:
            layer = replace(layer, input=layer.input.float8())
        product = products.get(name) if node.op_type == "MatMul" and in_attention(node) else None
        if layer is not None and _constant_weight(node):
            rewriter.layer(node, name, layer)
            rewritten.add(name)
        elif product is not None:
            rewriter.product(node, name, product)
            rewritten.add(name)
    wanted = (plan.layers.keys() | products.keys()) - (step.baked if step else frozenset())
    missing = sorted(wanted - rewritten)
    if missing:
        raise GaqError(
            f"{len(missing)} of {len(wanted)} quantized layers are not in the exported graph (first: "
            f"{missing[0]!r}): the plan belongs to another model, or the exporter has changed its metadata."
        )
    RemoveUnusedNodesPass()(model)
    return model


def _constant_weight(node: ir.Node) -> bool:
    """Tell a layer's weight from a product of two activations in the same module."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value is not None and value.const_value is not None


class _Rewriter:
    """Rewrites the nodes of one graph; Q/DQ of an input is shared by the layers that read it (q, k, v).

    Args:
        graph: its second input is a timestep or the index of a step.
        profile: the target's wishes.
        steps: which of the plan's steps each value of that input takes its grids from; None if all share one.
    """

    def __init__(self, graph: ir.Graph, profile: QdqProfile, given: ir.Value, steps: torch.Tensor | None) -> None:
        self._write = GraphWriter(graph)
        self._graph, self._profile, self._given, self._steps = graph, profile, given, steps
        self._shared: dict[tuple[ir.Value, Grid, tuple[int, ...]], ir.Value] = {}
        self._index: ir.Value | None = None

    def layer(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        """Quantize the input and the weight of one layer."""
        source, grid = node.inputs[0], layer.input
        assert source is not None
        constant = grid.ratio is None and (self._profile.zero_points or not any(grid.zero))
        behind = self._profile.factors_behind and not constant
        pads = _take_pads(node) if behind and any(grid.zero) else ()
        key = (source, grid, pads)
        if key not in self._shared:
            value = self._padded(source, pads, f"{name}.input")
            self._shared[key] = self._rounded(value, f"{name}.input", grid, _rank(node), keep_moved=behind)
        node.replace_input_with(0, self._shared[key])
        node.replace_input_with(1, self._weight(node, name, layer))
        self._write.insert_before(node)
        if behind:
            self._move_back(node, name, layer)
        elif self._profile.quantize_outputs and node.op_type in ("Conv", "Gemm") and grid.ratio is None:
            out = node.outputs[0]
            self._replace(node, self._quantize(out, f"{name}.output", Grid(scale=layer.output_scale, bits=8)))

    def product(self, node: ir.Node, name: str, product: ProductQuant) -> None:
        """Quantize both factors of q k^T, or of the product of its softmax with v."""
        left = node.inputs[0]
        producer = left.producer() if left is not None else None
        second = producer is not None and producer.op_type == "Softmax"
        for i, operand in enumerate(("probability", "value") if second else ("query", "key")):
            source = node.inputs[i]
            assert source is not None
            rounded = self._rounded(source, f"{name}.{operand}", getattr(product, operand), _rank(node))
            node.replace_input_with(i, rounded)
        self._write.insert_before(node)

    def _rounded(self, value: ir.Value, name: str, grid: Grid, rank: int, *, keep_moved: bool = False) -> ir.Value:
        """Return `value` rounded to `grid`; if `keep_moved`, still divided by the ratio and shifted."""
        if grid.log2:
            return self._power_of_two(value, name, grid)
        if grid.ratio is None and not keep_moved:
            return self._quantize(value, name, grid)
        ratio = shift = None
        if grid.ratio is not None:
            ratio = self._row(f"{name}.ratio", np.array(grid.ratio), rank)
            value = self._write.node("Div", [value, ratio], f"{name}.divided")
        if any(grid.zero):
            shift = self._row(f"{name}.shift", _shifts(grid), rank)
            value = self._write.node("Add", [value, shift], f"{name}.shifted")
        value = self._quantize(value, name, Grid(scale=grid.scale, bits=grid.bits))
        if keep_moved:
            return value
        if shift is not None:
            value = self._write.node("Sub", [value, shift], f"{name}.unshifted")
        return self._write.node("Mul", [value, ratio], f"{name}.multiplied") if ratio is not None else value

    def _power_of_two(self, value: ir.Value, name: str, grid: Grid) -> ir.Value:
        """Return `value` rounded to a power of two, in float: no integer product takes such codes."""

        def number(what: str, of: float) -> ir.Value:
            return self._write.constant(f"{name}.{what}", np.float32(of))

        value = self._write.node("Div", [value, number("scale", grid.scale)], f"{name}.divided")
        value = self._write.node("Log", [value], f"{name}.log")
        value = self._write.node("Mul", [value, number("per_octave", -1 / math.log(2))], f"{name}.octaves")
        value = self._write.node("Round", [value], f"{name}.rounded")
        bounds = [number("low", 0), number("high", 2**grid.bits - 1)]
        value = self._write.node("Clip", [value, *bounds], f"{name}.code")
        value = self._write.node("Mul", [value, number("octave", -math.log(2))], f"{name}.log_rounded")
        value = self._write.node("Exp", [value], f"{name}.power")
        return self._write.node("Mul", [value, number("unit", grid.scale)], f"{name}.multiplied")

    def _move_back(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        """Undo behind the layer what `_rounded` left moved: the ratio as a factor, the shift in the bias."""
        grid, rank, axis = layer.input, _rank(node), 1 if node.op_type == "Conv" else -1
        reach = layer.codes.flatten(1).sum(1).double() * layer.weight_scale.double()  # (O,) sum of each row's weights
        ratios = np.array(grid.ratio or (1.0,), dtype=np.float64)
        bias = _take_bias(node) - np.outer(ratios * _shifts(grid), reach.numpy())  # (1 or S, O)
        out = node.outputs[0]
        result = out
        if grid.ratio is not None:
            result = self._write.node("Mul", [out, self._row(f"{name}.back", ratios, rank)], f"{name}.multiplied")
        if np.any(bias):
            shape = [1] * (rank - 1)
            shape[axis if axis < 0 else axis - 1] = -1
            result = self._write.node("Add", [result, self._row(f"{name}.bias", bias, rank, shape)], f"{name}.biased")
        self._replace(node, result)

    def _row(
        self, name: str, table: npt.NDArray[np.floating], rank: int, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Return the entry of `table` (1 or S, ...) for the step at hand, as something that broadcasts."""
        rows = table.astype(np.float32).reshape(len(table), *(shape or [1] * (rank - 1)))
        values = self._write.constant(f"{name}.rows", rows)
        return values if len(table) == 1 else self._write.node("Gather", [values, self._step()], name)

    def _step(self) -> ir.Value:
        """Return which row of the tables serves the step at hand, (1,) or (N,)."""
        assert self._steps is not None
        if self._index is None:
            rows = self._write.constant("plan_step.rows", self._steps.numpy())
            self._index = self._write.node("Gather", [rows, self._given], "plan_step", ir.DataType.INT64)
        return self._index

    def _padded(self, value: ir.Value, pads: tuple[int, ...], name: str) -> ir.Value:
        if not any(pads):
            return value
        half = len(pads) // 2  # a convolution's are for its spatial dimensions only
        full = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], dtype=np.int64)
        zero = self._write.constant(f"{name}.nothing", np.float32(0))
        return self._write.node("Pad", [value, self._write.constant(f"{name}.pads", full), zero], f"{name}.padded")

    def _quantize(self, value: ir.Value, name: str, grid: Grid) -> ir.Value:
        """Quantize and dequantize `value`; narrower grids are an 8-bit one behind a Clip."""
        (zero,) = grid.zero
        if grid.bits < 8:
            codes = np.array(integer_range(grid.bits), dtype=np.float32) - zero
            bounds = [
                self._write.constant(f"{name}.{end}", v)
                for end, v in zip(("low", "high"), codes * np.float32(grid.scale), strict=True)
            ]
            value = self._write.node("Clip", [value, *bounds], f"{name}.clipped")
        point: np.generic = np.uint8(128 + zero) if self._profile.unsigned or zero else np.int8(0)
        if self._profile.float8:
            point = ml_dtypes.float8_e4m3fn(0)
        kind = ir.DataType.from_numpy(point.dtype)
        parameters = [
            self._write.constant(f"{name}.scale", np.float32(grid.scale)),
            self._write.constant(f"{name}.zero", point),
        ]
        q = self._write.node("QuantizeLinear", [value, *parameters], f"{name}.q", kind)
        return self._write.node("DequantizeLinear", [q, *parameters], f"{name}.dq")

    def _weight(self, node: ir.Node, name: str, layer: LayerQuant) -> ir.Value:
        codes, axis = _oriented(node, layer.codes.numpy())
        scale = self._write.constant(f"{name}.weight_scale", layer.weight_scale.numpy())
        form = self._profile.int4 if layer.weight_bits <= 4 else "expand"
        form = "float8" if self._profile.float8 else form
        kind, held = _WEIGHTS[form]
        value = self._write.constant(f"{name}.weight_{kind}", codes.astype(held))
        if form == "cast":
            one = self._write.constant(f"{name}.one", np.float32(1))
            value = self._write.node("DequantizeLinear", [value, one], f"{name}.unpacked")
            value = self._write.node("Cast", [value], f"{name}.int8", ir.DataType.INT8, {"to": int(ir.DataType.INT8)})
        return self._write.node("DequantizeLinear", [value, scale], f"{name}.dequantized", attributes={"axis": axis})

    def _replace(self, node: ir.Node, result: ir.Value) -> None:
        """Give what reads the output of `node` the `result` of the new nodes instead; those still read the output."""
        out, added = node.outputs[0], self._write.pending
        if result is out:
            return
        readers = [(user, index) for user, index in out.uses() if user in added]
        ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
        for user, index in readers:
            user.replace_input_with(index, out)
        self._write.insert_after(node)


def _rank(node: ir.Node) -> int:
    """Return the rank of the output, which is that of the input."""
    shape = node.outputs[0].shape
    assert shape is not None
    return len(shape)


def _shifts(grid: Grid) -> npt.NDArray[np.float32]:
    """Return what is added to values before they are rounded, (1 or S,): as `calib.affine.fake_quantize` has it."""
    return np.float32(grid.scale) * np.array(grid.zero, dtype=np.float32)


def _take_pads(node: ir.Node) -> tuple[int, ...]:
    """Return the padding of a convolution and set it to nothing; () for another layer."""
    pads = node.attributes.get("pads")
    if pads is None:
        return ()
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads.as_ints()))
    return tuple(pads.as_ints())


def _take_bias(node: ir.Node) -> npt.NDArray[np.float64]:
    """Return the bias of a layer, (O,) or (1,), and take it away."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(1)
    assert value.const_value is not None
    node.resize_inputs(2)
    return value.const_value.numpy().astype(np.float64)


def _oriented(node: ir.Node, codes: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int8], int]:
    """Return the codes as `node` wants its weight, and their channel axis: a MatMul's weight is (in, out)."""
    transposed = node.attributes.get("transB")
    if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed is not None and transposed.as_int() == 1):
        return codes, 0
    return np.ascontiguousarray(codes.T), 1
