"""The exported graph means what fake-quantized PyTorch computes, over the whole bundled network at W4A8.

In float32 two correct implementations drift apart (see gaq_export.parity), so this one is done in float64, where a
value never lands on the other side of a rounding edge: ONNX's own reference evaluator against PyTorch.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from calib.calibrate import calibrate
from calib.config import OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from gaq_export.models import load_model
from gaq_export.onnx_export import export_float
from gaq_export.profiles import PROFILES
from gaq_export.qdq import insert_qdq, save_onnx


def test_the_w4a8_reference_graph_of_the_bundled_model_equals_fake_quantized_pytorch(tmp_path: Path) -> None:
    model = load_model("ddpm-mnist")
    step = torch.arange(4).repeat_interleave(4)
    generator = torch.Generator().manual_seed(0)
    data = CalibrationSet(x=torch.randn(16, 1, 32, 32, generator=generator), t=step * 250, step=step)
    config = QuantConfig(reconstruction=ReconstructionConfig(iterations=0), omega=OmegaConfig(rule="uniform"))
    plan = calibrate(model.network, data, config, timesteps=1000)
    path = tmp_path / "reference.onnx"
    save_onnx(insert_qdq(export_float(model.network, model.shape), plan, PROFILES["reference"]), path)

    # At t = 0 the sines of the embedding are exact; elsewhere PyTorch's, always single precision, differ by machine.
    x, t = torch.randn(1, 1, 32, 32, generator=generator, dtype=torch.float64), torch.tensor([0])
    with torch.no_grad():
        expected = fake_quantized(model.network, plan).double()(x, t).numpy()
        unquantized = model.network(x.float(), t).numpy()
    (found,) = ReferenceEvaluator(_in_double(onnx.load(path))).run(None, {"x": x.numpy(), "t": t.numpy()})
    assert _relative(found, expected) <= 1e-5
    assert _relative(unquantized, expected) > 1e-2  # the test would notice a graph that quantizes nothing


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
