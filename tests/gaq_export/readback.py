"""Reading an exported graph back: which node belongs to which layer, and what it computes beside PyTorch."""

import copy
import re
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from calib.data import CalibrationSet

WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class QuantizedNode:
    """A weighted node of the graph, read back: its layer, its Q, what that reads, what it gives, its weight."""

    layer: str
    node: onnx.NodeProto
    quantizer: onnx.NodeProto
    source: str
    output: str
    codes: onnx.TensorProto
    scale: onnx.TensorProto
    axis: int


class Graph:
    """An ONNX graph as a lookup from value to producer and readers."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.constants = {t.name: t for t in proto.graph.initializer}
        self.producer = {out: node for node in proto.graph.node for out in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def op(self, value: str) -> str:
        return self.producer[value].op_type if value in self.producer else ""

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.op_type in kinds]

    def quantized(self) -> list[QuantizedNode]:
        return [self._read(node) for node in self._of_codes() if not self._rounds(node.input[1])]

    def products(self) -> list[onnx.NodeProto]:
        return [node for node in self._of_codes() if self._rounds(node.input[1])]

    def _of_codes(self) -> list[onnx.NodeProto]:
        return [n for n in self.nodes(*WEIGHTED) if self.op(n.input[1]) == "DequantizeLinear"]

    def _rounds(self, value: str) -> bool:
        return self.op(self.producer[value].input[0]) == "QuantizeLinear"

    def _read(self, node: onnx.NodeProto) -> QuantizedNode:
        weight = self.producer[node.input[1]]
        value = weight.input[0]
        if self.op(value) == "Cast":  # packed INT4, unpacked by a DequantizeLinear of scale 1
            unpack = self.producer[self.producer[value].input[0]]
            assert numpy_helper.to_array(self.constants[unpack.input[1]]) == 1
            value = unpack.input[0]
        name = re.fullmatch(r"(.+)\.weight_(?:int[48]|float8)(\.\d+)?", value)
        assert name
        source = node.input[0]
        while self.op(source) != "QuantizeLinear":  # what undoes the grid's move is before the layer or behind it
            source = self.producer[source].input[0]
        quantizer = self.producer[source]
        source = quantizer.input[0]
        while source in self.producer and self.producer[source].name.startswith(
            f"{quantizer.name.rpartition('.q.')[0]}."
        ):
            source = self.producer[source].input[0]
        output = node.output[0]
        while behind := [r for r in self.readers.get(output, []) if r.name.startswith(f"{name[1]}.")]:
            if behind[0].op_type not in ("Mul", "Add"):
                break
            output = behind[0].output[0]
        after = self.readers.get(output, [])
        added = [v for n in after if n.op_type == "Add" for v in n.input]
        if node.op_type == "MatMul" and len(after) == 1 and any(v in self.constants for v in added):
            output = after[0].output[0]  # its bias
        return QuantizedNode(
            layer=name[1],
            node=node,
            quantizer=quantizer,
            source=source,
            output=output,
            codes=self.constants[value],
            scale=self.constants[weight.input[1]],
            axis=next(a.i for a in weight.attribute if a.name == "axis"),
        )


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(proto: onnx.ModelProto, data: CalibrationSet) -> torch.Tensor:
    return torch.from_numpy(session(proto).run(["eps"], {"x": data.x.numpy(), "t": data.t.numpy()})[0])


def layer_errors(proto: onnx.ModelProto, fake: torch.nn.Module, data: CalibrationSet) -> dict[str, float]:
    """Return |graph - torch| / |torch| of each quantized node, both fed what the graph's node was fed.

    An input within a millionth of a rounding edge may be either code: each output counts as the nearest that torch has.
    """
    nodes = Graph(proto).quantized()
    wanted = sorted({v for n in nodes for v in (n.source, n.output)} - {"x", "t", "eps"})
    probed = copy.deepcopy(proto)
    probed.graph.output.extend(helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in wanted)
    feeds = {"x": data.x.numpy(), "t": data.t.numpy()}
    seen = dict(zip([*wanted, "eps"], session(probed).run([*wanted, "eps"], feeds), strict=True)) | feeds
    errors = {}
    for n in nodes:
        layer, fed = fake.get_submodule(n.layer), torch.from_numpy(seen[n.source])
        with torch.no_grad():
            expected = np.stack([layer(fed + part * fed.abs().max()).numpy() for part in (0.0, -1e-6, 1e-6)])
        apart = np.abs(seen[n.output] - expected).min(0)
        errors[n.node.name] = np.linalg.norm(apart) / np.linalg.norm(expected[0])
    return errors
