"""What a machine could do at best, and what a step of ours spends its time on."""

import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, int, int]


def openvino_profile(model: onnx.ModelProto, shape: Shape, batch: int, runs: int = 10) -> dict[str, float]:
    """Return the seconds that one step of an engine of ours spends by kind of layer, median of some runs."""
    core = openvino.Core()
    graph = core.read_model(model.SerializeToString())
    graph.reshape({port.any_name: [1] if port.any_name == "step" else [batch, *shape] for port in graph.inputs})
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    feeds = {port.any_name: np.zeros(list(port.shape), port.element_type.to_dtype()) for port in graph.inputs}
    spent: dict[str, list[float]] = {}
    for _ in range(runs):
        request.infer(feeds)
        once: Counter[str] = Counter()
        for layer in request.profiling_info:
            once[layer.node_type] += layer.real_time.total_seconds()
        for kind, seconds in once.items():
            spent.setdefault(kind, []).append(seconds)
    return {kind: statistics.median(seconds) for kind, seconds in spent.items()}


def macs(network: nn.Module, shape: Shape) -> int:
    """Return the multiplications of one image's pass, as PyTorch counts floating-point operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops()) // 2


def int8_peak(folder: Path, channels: int = 256, size: int = 32, batch: int = 4) -> float:
    """Return multiplications a second of one INT8 convolution, 3x3, in OpenVINO, best of some runs."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.integers(-8, 8, (channels, channels, 3, 3)).astype(np.int8),
        "ws": np.full(channels, 0.01, np.float32),
        "s": np.float32(0.05),
        "z": np.int8(0),
    }
    nodes = [("QuantizeLinear", ["x", "s", "z"], "q"), ("DequantizeLinear", ["q", "s", "z"], "dq")]
    made = [helper.make_node(op, inputs, [out]) for op, inputs, out in nodes]
    made.append(helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0))
    made.append(helper.make_node("Conv", ["dq", "wd"], ["y"], pads=[1, 1, 1, 1]))
    image = [batch, channels, size, size]
    graph = helper.make_graph(
        made,
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, image)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options).create_infer_request()
    feed, seconds = {"x": random.standard_normal(image).astype(np.float32)}, []
    for _ in range(30):
        request.infer(feed)
        seconds += [p.real_time.total_seconds() for p in request.profiling_info if p.node_type == "Convolution"]
        time.sleep(0.01)
    return float(batch * size**2 * channels**2 * 9 / min(seconds))
