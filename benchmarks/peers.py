"""What other tools make of the same float network: each takes an `Order`, and gives something called as (x, t)."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from calib.silence import silenced
from gaq_export.graph.export import module_of
from gaq_export.graph.qdq import WEIGHTED

SAMPLES = 16  # of noise, where only time is measured
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # of values, none of which they change
Arrays = dict[str, npt.NDArray[Any]]
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a peer is given.

    Attributes:
        network: the float network.
        graph: its ONNX file.
        folder: for the peer's own files.
        samples: calibration inputs, arrays `x` (N, C, H, W) and `t` (N,) each.
        wbits: bits of the weights; activations have 8.
        kept: names of modules that stay float; if there are any, everything without weights stays float too.
        static: batch size to compile for, where that is possible; any if None.
        iterations: of what learns the rounding, a layer.
    """

    network: nn.Module
    graph: Path
    folder: Path
    samples: Sequence[Arrays]
    wbits: int = 8
    kept: frozenset[str] = field(default=frozenset())
    static: int | None = None
    iterations: int = 1000


def noise_samples(shape: tuple[int, int, int], batch: int) -> list[Arrays]:
    """Return inputs that are good enough where only time is measured."""
    random = np.random.default_rng(0)
    return [
        {
            "x": random.standard_normal((batch, *shape)).astype(np.float32),
            "t": np.full(batch, 1000 * i // SAMPLES, np.int64),
        }
        for i in range(SAMPLES)
    ]


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: Iterable[Arrays]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Arrays | None:
        """Return the next sample."""
        return next(self._samples, None)


def onnxruntime_static(order: Order) -> Denoise:
    """ONNX Runtime's own `quantize_static`: QDQ, per-channel signed weights, unsigned activations."""
    ready, out = order.folder / "prepared.onnx", order.folder / "static.onnx"
    kinds = {4: quantization.QuantType.QInt4, 8: quantization.QuantType.QInt8}
    with silenced("root"):
        quantization.shape_inference.quant_pre_process(str(order.graph), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(ready),
            str(out),
            _Reader(order.samples),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=kinds[order.wbits],
            nodes_to_exclude=_nodes(order),
            op_types_to_quantize=list(WEIGHTED) if order.kept else None,
        )
    return _session(out)


def openvino_nncf(order: Order) -> Denoise:
    """NNCF's post-training quantization, run by OpenVINO."""
    import nncf

    model = openvino.Core().read_model(order.graph)
    if order.static:
        model.reshape({"x": [order.static, *order.samples[0]["x"].shape[1:]], "t": [order.static]})
    ignored = nncf.IgnoredScope(patterns=[f"{re.escape(name)}(/.*)?$" for name in _nodes(order)], validate=False)
    data = nncf.Dataset(list(order.samples))
    quantized = nncf.quantize(model, data, subset_size=len(order.samples), ignored_scope=ignored)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()
    return lambda x, t: torch.from_numpy(
        request.infer({"x": x.numpy(), "t": t.numpy()}, share_inputs=True)["eps"].copy()
    )


def nvidia_modelopt(order: Order) -> Denoise:
    """NVIDIA ModelOpt's INT8 for PyTorch, its weights also in fewer bits; computed by PyTorch, simulated."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["num_bits"] = order.wbits
    config["quant_cfg"] += [{"quantizer_name": f"{name}.*", "enable": False} for name in order.kept]

    def calibrate(network: nn.Module) -> None:
        for sample in order.samples:
            network(torch.from_numpy(sample["x"]), torch.from_numpy(sample["t"]))

    with torch.no_grad():
        quantized = mtq.quantize(copy.deepcopy(order.network), config, calibrate)
    return lambda x, t: quantized(x, t)


def aimet_adaround(order: Order) -> Denoise:
    """AIMET's AdaRound and its activation ranges for ONNX; computed by ONNX Runtime, simulated."""
    import aimet_onnx

    sim = aimet_onnx.QuantizationSimModel(
        onnx.load(order.graph),
        param_type=f"int{order.wbits}",
        activation_type="int8",
        providers=["CPUExecutionProvider"],
    )
    if order.kept:
        kept, rounded = set(_nodes(order)), set[str]()
        makers = {str(value.name): node for node in ir.load(order.graph).graph for value in node.outputs}
        for node in sim.model.model.graph.node:
            x, weight = [name.removesuffix("_qdq").removesuffix("_updated") for name in [*node.input[:2], "", ""][:2]]
            if node.op_type in WEIGHTED and weight in sim.param_names and node.name not in kept:
                rounded |= {_before_moves(makers, x, sim.qc_quantize_op_dict), weight}
        for name, quantizer in sim.qc_quantize_op_dict.items():
            quantizer.enabled = quantizer.enabled and name in rounded
    aimet_onnx.apply_adaround(sim, list(order.samples), num_iterations=order.iterations)
    sim.compute_encodings(list(order.samples))
    return lambda x, t: torch.from_numpy(sim.session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])


def _before_moves(makers: Mapping[str, ir.Node], name: str, rounded: Collection[str]) -> str:
    """Return the tensor that holds the values of `name` where AIMET rounds them: before they are moved about."""
    while name not in rounded and name in makers and makers[name].op_type in MOVES:
        source = makers[name].inputs[0]
        assert source is not None
        name = str(source.name)
    return name


def _session(path: Path) -> Denoise:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(session.run(["eps"], {"x": x.numpy(), "t": t.numpy()})[0])


def _nodes(order: Order) -> list[str]:
    """Return the names of the graph's nodes that are layers which stay float."""
    graph = ir.load(order.graph).graph
    return [str(n.name) for n in graph if n.op_type in WEIGHTED and module_of(n) in order.kept]
