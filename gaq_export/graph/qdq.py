"""Write a plan into a float ONNX graph: Q/DQ on the input of every quantized layer, its weight as integers.

In: a float graph and a `QuantPlan`. Out: the same graph with

    x -> layer(weight, bias)   become   x -> Q -> DQ -> layer(DQ(codes), bias)

in the form that a profile asks for. Nodes are matched by the module scope that the exporter records on each of them,
not by weight names: linear layers without a bias lose theirs (their weight is transposed and renamed). The original
weight is never read; the plan's codes take its place, so the file holds what was calibrated. The pass raises unless it
rewrote every layer of the plan.

TensorRT's builder crashes on a scale that is looked up in a table, and its parser refuses zero points. So a grid that
changes from step to step, and one whose 0 is not in the middle, are written around a quantizer that is constant and
symmetric, with the factor and the shift (scale * zero) of the step outside:

    Div(ratio[step]) -> Add(shift[step]) -> Q -> DQ -> layer -> Mul(ratio[step]) -> Add(bias[step])

The bias takes back what the shift adds to every output: W (x + shift) = W x + shift * (sum of each row of W). It only
does if every position sees the shift, so a convolution's padding, 0 before the shift, is made before it. The factors
stand after the layer, not before it, because then its arithmetic stays in integers.
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
from gaq_export.graph.profiles import QdqProfile, WeightForm
from gaq_export.graph.writer import GraphWriter

WEIGHTED = ("Conv", "Gemm", "MatMul")
# Name, in the names of constants, and type of the codes.
_CODES: dict[WeightForm, tuple[str, npt.DTypeLike]] = {
    WeightForm.INT8: ("int8", np.int8),
    WeightForm.INT4: ("int4", ml_dtypes.int4),
    WeightForm.INT4_CAST: ("int4", ml_dtypes.int4),
    WeightForm.FLOAT8: ("float8", ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What `gaq_export.graph.step` did to a graph whose second input is the index of a step, not a timestep.

    Attributes:
        timesteps: timestep of each step, (S,) int64.
        baked: names of the modules whose layers are time tables now.
        index: the value that holds that index inside the network: (1,), (N,) with a step for each image, (2N,) if
            guidance doubles those.
    """

    timesteps: torch.Tensor
    baked: frozenset[str]
    index: ir.Value


def insert_qdq(model: ir.Model, plan: QuantPlan, profile: QdqProfile, step: StepInfo | None = None) -> ir.Model:
    """Rewrite `model` in place and return it.

    Args:
        model: float graph from `export_float`, or one that `make_step` turned into a step.
        plan: integer weights and scales by module name.
        profile: what the target takes.
        step: what `make_step` returned; None for a graph whose second input is the timestep.

    Raises:
        GaqError: a layer of the plan has no node in the graph.
    """
    products = plan.products if profile.unsigned_products else {}
    rewriter = _Rewriter(model.graph, profile, _step_input(model.graph, plan, step))
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
    expected = (plan.layers.keys() | products.keys()) - (step.baked if step else frozenset())
    missing = sorted(expected - rewritten)
    if missing:
        raise GaqError(
            f"{len(missing)} of {len(expected)} quantized layers are not in the exported graph (first: "
            f"{missing[0]!r}): the plan belongs to another model, or the exporter has changed its metadata."
        )
    RemoveUnusedNodesPass()(model)  # the float weights, whose readers are gone
    return model


@dataclass(frozen=True, kw_only=True)
class _StepInput:
    """How a graph says which of the plan's steps it is at.

    Attributes:
        value: its timestep or the index of its step, (1,) or (N,) int64.
        plan_step: for each value that this can take, the step of the plan whose grids serve it, (num_train,) or (S,)
            int64; None if all steps share their grids.
    """

    value: ir.Value
    plan_step: torch.Tensor | None


def _step_input(graph: ir.Graph, plan: QuantPlan, step: StepInfo | None) -> _StepInput:
    timesteps = torch.arange(plan.num_train) if step is None else step.timesteps
    return _StepInput(
        value=graph.inputs[1] if step is None else step.index,
        # A plan may have other steps than the sampler: the nearest in time serves.
        plan_step=None if plan.timesteps is None else nearest_step(plan.timesteps, timesteps),
    )


def layer_weights(graph: ir.Graph) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Return the weights in a float graph by the name of their layer: one for each node that computes it.

    Those of linear layers are (out, in) as in PyTorch, or transposed.
    """
    weights: dict[str, list[npt.NDArray[np.float32]]] = {}
    for node in graph:
        value = _weight_of(node) if node.op_type in WEIGHTED else None
        if value is not None and value.const_value is not None:
            weights.setdefault(module_of(node), []).append(value.const_value.numpy())
    return weights


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return the second factor of a node as it was before a transposition."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":  # a linear layer's weight is (out, in) in PyTorch
        return producer.inputs[0]
    return value


def _constant_weight(node: ir.Node) -> bool:
    """Return whether the second factor is a weight, and not an activation multiplied in the same module."""
    value = _weight_of(node)
    return value is not None and value.const_value is not None


class _Rewriter:
    """Rewrites the nodes of one graph.

    Layers that read the same value on the same grid (q, k and v) share its Q/DQ: TensorRT then merges them into one
    product.

    Args:
        graph: the graph to rewrite.
        profile: what the target takes.
        step: how the graph says which step it is at.
    """

    def __init__(self, graph: ir.Graph, profile: QdqProfile, step: _StepInput) -> None:
        self._write = GraphWriter(graph)
        self._graph = graph
        self._profile = profile
        self._step = step
        self._shared: dict[tuple[ir.Value, Grid, tuple[int, ...]], ir.Value] = {}
        self._plan_step: ir.Value | None = None

    def layer(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        """Quantize the input and the weight of one layer."""
        source = node.inputs[0]
        grid = layer.input
        assert source is not None
        # A constant grid, its zero point included if the target takes one, needs Q/DQ alone and nothing around it.
        constant = grid.ratio is None and (self._profile.zero_points or not any(grid.zero))
        after = self._profile.factors_after and not constant
        # The border must hold the shift as the image does, so it is padded with 0 before the shift is added.
        pads = _take_pads(node) if after and any(grid.zero) else ()
        key = (source, grid, pads)
        if key not in self._shared:
            value = self._padded(source, pads, f"{name}.input")
            self._shared[key] = self._rounded(value, f"{name}.input", grid, _rank(node), keep_moved=after)
        node.replace_input_with(0, self._shared[key])
        node.replace_input_with(1, self._weight(node, name, layer))
        self._write.insert_before(node)
        if after:
            self._move_back(node, name, layer)
        elif self._profile.quantize_outputs and node.op_type in ("Conv", "Gemm") and grid.ratio is None:
            # ONNX Runtime fuses DQ -> Conv -> Q into an integer convolution, and only all three; a MatMul needs no Q.
            out = node.outputs[0]
            self._replace(node, self._quantize(out, f"{name}.output", Grid(scale=layer.output_scale, bits=8)))

    def product(self, node: ir.Node, name: str, product: ProductQuant) -> None:
        """Quantize both factors of q k^T, (N, heads, L, D), or of softmax(q k^T) v."""
        left = node.inputs[0]
        producer = left.producer() if left is not None else None
        after_softmax = producer is not None and producer.op_type == "Softmax"
        for i, operand in enumerate(("probability", "value") if after_softmax else ("query", "key")):
            source = node.inputs[i]
            assert source is not None
            rounded = self._rounded(source, f"{name}.{operand}", getattr(product, operand), _rank(node))
            node.replace_input_with(i, rounded)
        self._write.insert_before(node)

    def _rounded(self, value: ir.Value, name: str, grid: Grid, rank: int, *, keep_moved: bool = False) -> ir.Value:
        """Return `value` rounded to `grid`.

        In: value. Out: Div(ratio) -> Add(shift) -> Q -> DQ [-> Sub(shift) -> Mul(ratio)], of which a grid without ratio
        or shift has less. The part in brackets is left out if `keep_moved`; `_move_back` then does it after the layer.
        """
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
        value = self._quantize(value, name, Grid(scale=grid.scale, bits=grid.bits))  # zero is in the shift now
        if keep_moved:
            return value
        if shift is not None:
            value = self._write.node("Sub", [value, shift], f"{name}.unshifted")
        return self._write.node("Mul", [value, ratio], f"{name}.multiplied") if ratio is not None else value

    def _power_of_two(self, value: ir.Value, name: str, grid: Grid) -> ir.Value:
        """Return `value` rounded to scale * 2^-code, in float: no integer product takes such codes.

        code = clip(round(-log2(value / scale)), 0, 2^bits - 1). Softmax's probabilities have such grids; a probability
        of 0 has an infinite logarithm, which the clip brings to the largest code.
        """

        def number(suffix: str, number: float) -> ir.Value:
            return self._write.constant(f"{name}.{suffix}", np.float32(number))

        value = self._write.node("Div", [value, number("scale", grid.scale)], f"{name}.divided")
        value = self._write.node("Log", [value], f"{name}.log")  # ONNX has the natural logarithm only
        value = self._write.node("Mul", [value, number("per_octave", -1 / math.log(2))], f"{name}.octaves")
        value = self._write.node("Round", [value], f"{name}.rounded")
        bounds = [number("low", 0), number("high", 2**grid.bits - 1)]
        value = self._write.node("Clip", [value, *bounds], f"{name}.code")
        value = self._write.node("Mul", [value, number("octave", -math.log(2))], f"{name}.log_rounded")
        value = self._write.node("Exp", [value], f"{name}.power")
        return self._write.node("Mul", [value, number("unit", grid.scale)], f"{name}.multiplied")

    def _move_back(self, node: ir.Node, name: str, layer: LayerQuant) -> None:
        """Undo after the layer what `_rounded` left in place: the ratio as a factor, the shift in the bias.

        In: layer -> readers. Out: layer without bias -> Mul(ratio) -> Add(bias - ratio * shift * row sums) -> readers.
        TensorRT merges both into the epilogue of the integer product.
        """
        grid = layer.input
        rank = _rank(node)
        axis = 1 if node.op_type == "Conv" else -1  # of the output channels: (N, O, H, W) or (..., O)
        row_sums = layer.codes.flatten(1).sum(1).double() * layer.weight_scale.double()  # (O,)
        ratios = np.array(grid.ratio or (1.0,), dtype=np.float64)
        # In float64, and rounded to float32 once: this is a small difference of large numbers.
        bias = _take_bias(node) - np.outer(ratios * _shifts(grid), row_sums.numpy())  # (1 or S, O)
        out = node.outputs[0]
        result = out
        if grid.ratio is not None:
            result = self._write.node("Mul", [out, self._row(f"{name}.back", ratios, rank)], f"{name}.multiplied")
        if np.any(bias):
            shape = [1] * (rank - 1)  # without the batch: (O, 1, 1) for a convolution, (..., 1, O) for a product
            shape[axis if axis < 0 else axis - 1] = -1
            result = self._write.node("Add", [result, self._row(f"{name}.bias", bias, rank, shape)], f"{name}.biased")
        self._replace(node, result)

    def _row(
        self, name: str, table: npt.NDArray[np.floating], rank: int, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Return the row of `table` (1 or S, ...) for the current step; its `rank` dimensions broadcast."""
        rows = table.astype(np.float32).reshape(len(table), *(shape or [1] * (rank - 1)))
        values = self._write.constant(f"{name}.rows", rows)
        return values if len(table) == 1 else self._write.node("Gather", [values, self._row_index()], name)

    def _row_index(self) -> ir.Value:
        """Return which row of the tables serves the current step, (1,) or (N,); all tables share one lookup."""
        assert self._step.plan_step is not None
        if self._plan_step is None:
            rows = self._write.constant("plan_step.rows", self._step.plan_step.numpy())
            self._plan_step = self._write.node("Gather", [rows, self._step.value], "plan_step", ir.DataType.INT64)
        return self._plan_step

    def _padded(self, value: ir.Value, pads: tuple[int, ...], name: str) -> ir.Value:
        """Return `value` padded with 0 as a convolution would: (N, C, H, W) -> (N, C, H + pads, W + pads)."""
        if not any(pads):
            return value
        half = len(pads) // 2  # begins, then ends; a convolution's are for its spatial dimensions only
        full = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], dtype=np.int64)
        zero = self._write.constant(f"{name}.nothing", np.float32(0))
        return self._write.node("Pad", [value, self._write.constant(f"{name}.pads", full), zero], f"{name}.padded")

    def _quantize(self, value: ir.Value, name: str, grid: Grid) -> ir.Value:
        """Return QuantizeLinear -> DequantizeLinear of `value`, with a Clip before them on grids under 8 bits."""
        (zero,) = grid.zero
        if grid.bits < 8:
            # Runtimes have 8-bit activations only: the codes of a narrower grid are the middle of those.
            codes = np.array(integer_range(grid.bits), dtype=np.float32) - zero
            bounds = [
                self._write.constant(f"{name}.{end}", v)
                for end, v in zip(("low", "high"), codes * np.float32(grid.scale), strict=True)
            ]
            value = self._write.node("Clip", [value, *bounds], f"{name}.clipped")
        # Codes are signed in the plan. UINT8 holds code + 128, so 128 + zero stands for 0 there; the same numbers.
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
        """Return codes -> DequantizeLinear(scale of each output channel), in the profile's form of the codes."""
        codes, axis = _oriented(node, layer.codes.numpy())
        scale = self._write.constant(f"{name}.weight_scale", layer.weight_scale.numpy())
        form = self._profile.weight_form(layer.weight_bits)
        suffix, dtype = _CODES[form]
        value = self._write.constant(f"{name}.weight_{suffix}", codes.astype(dtype))
        if form is WeightForm.INT4_CAST:
            # TensorRT's builder fails on INT4 weights beside INT8 activations, and INT4 may feed DequantizeLinear only:
            # a scale of 1 and a cast unpack the codes to INT8 exactly.
            one = self._write.constant(f"{name}.one", np.float32(1))
            value = self._write.node("DequantizeLinear", [value, one], f"{name}.unpacked")
            value = self._write.node("Cast", [value], f"{name}.int8", ir.DataType.INT8, {"to": int(ir.DataType.INT8)})
        return self._write.node("DequantizeLinear", [value, scale], f"{name}.dequantized", attributes={"axis": axis})

    def _replace(self, node: ir.Node, result: ir.Value) -> None:
        """Put the pending nodes after `node`: all that read its output read `result` instead, but they themselves."""
        out = node.outputs[0]
        added = self._write.pending
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
    """Return what is added to values before they are rounded, (1 or S,).

    In float32, as `calib.affine.fake_quantize` computes it, so that both round at the same edges.
    """
    return np.float32(grid.scale) * np.array(grid.zero, dtype=np.float32)


def _take_pads(node: ir.Node) -> tuple[int, ...]:
    """Return the padding of a convolution and set it to 0; () for another layer."""
    pads = node.attributes.get("pads")
    if pads is None:
        return ()
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads.as_ints()))
    return tuple(pads.as_ints())


def _take_bias(node: ir.Node) -> npt.NDArray[np.float64]:
    """Return the bias of a layer, (O,), and remove it; (1,) of 0 for a layer without one."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(1)
    assert value.const_value is not None
    node.resize_inputs(2)
    return value.const_value.numpy().astype(np.float64)


def _oriented(node: ir.Node, codes: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int8], int]:
    """Return the codes (O, ...) in the layout of the node's weight, and the axis of the output channels in it.

    The plan has PyTorch's layout, (out, in, ...), which Conv and a transposing Gemm share; a MatMul's is (in, out).
    """
    transposed = node.attributes.get("transB")
    if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed is not None and transposed.as_int() == 1):
        return codes, 0
    return np.ascontiguousarray(codes.T), 1
