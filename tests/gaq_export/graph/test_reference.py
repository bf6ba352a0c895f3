"""By topic, over `export`, `qdq` and `float64`: a graph means exactly what fake-quantized PyTorch computes.

Shown for the whole bundled network at W4A8, and for other grids on a small one.

In float32 two correct implementations drift apart (see deploy.parity), so this one is done in float64 throughout,
where a value never lands on the other side of a rounding edge: ONNX's own reference evaluator against PyTorch.
"""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from calib.affine import dequantize_weight
from calib.calibrate import calibrate
from calib.config import ActivationConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from gaq_export.deploy import build
from gaq_export.graph.files import save_onnx
from gaq_export.graph.float64 import to_float64
from gaq_export.graph.profiles import PROFILES
from gaq_export.graph.qdq import insert_qdq
from gaq_export.models.loader import LoadedModel, load_model


def test_the_w4a8_reference_graph_of_the_bundled_model_equals_fake_quantized_pytorch(tmp_path: Path) -> None:
    model = load_model("ddpm-mnist")
    _check(model, QuantConfig(reconstruction=ReconstructionConfig(iterations=0)), torch.tensor([500]), tmp_path)


# Each pair of choices once.
@pytest.mark.parametrize(
    ("convention", "per_step", "symmetric"),
    [("deploy", False, False), ("deploy", True, True), ("tfmq", False, True), ("tfmq", True, False)],
)
def test_so_do_graphs_with_grids_of_each_step_grids_moved_off_0_and_quantized_attention(
    convention: str, per_step: bool, symmetric: bool, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    config = QuantConfig(
        convention=convention,
        activation=ActivationConfig(per_step=per_step, symmetric=symmetric),
        reconstruction=ReconstructionConfig(iterations=0),
    )
    _check(tiny_model, config, torch.tensor([50, 0, 33, 99]), tmp_path)


def _check(model: LoadedModel, config: QuantConfig, t: Tensor, folder: Path) -> None:
    """Calibrate on four samples at each quarter of the timesteps, then compare on noise at `t` (N,)."""
    step, num_train = torch.arange(4).repeat_interleave(4), model.schedule.num_train
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, *model.shape, generator=generator)
    data = CalibrationSet(x=x, t=step * num_train // 4, step=step)
    plan = calibrate(model.network, data, config, timesteps=num_train)
    path = folder / "reference.onnx"
    save_onnx(insert_qdq(build.export_float(model.network, model.shape), plan, PROFILES["reference"]), path)

    x = torch.randn(len(t), *model.shape, generator=generator, dtype=torch.float64)
    graph = to_float64(onnx.load(path))
    _exact_biases(graph, model, plan)
    computed, embedding = _run(graph, x, t)
    expected = _fake_in_float64(model, plan, embedding)(x, t)
    assert _relative(computed, expected) <= 1e-9
    with torch.no_grad():
        unquantized = model.network(x.float(), t)
    assert _relative(unquantized, expected) > 1e-2  # the test would notice a graph that quantizes nothing


def _relative(computed: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(computed - expected) / torch.linalg.norm(expected))


def _exact_biases(graph: onnx.ModelProto, model: LoadedModel, plan: QuantPlan) -> None:
    """Put biases that were corrected for a shifted grid back to what they were before they were rounded to float32."""
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name, layer in plan.layers.items():
        tensor = tensors.get(f"{name}.bias.rows")
        if tensor is None:
            continue
        bias = getattr(model.network.get_submodule(name), "bias", None)
        weight = dequantize_weight(layer.codes, layer.weight_scale.double()).flatten(1)
        shift = torch.tensor(layer.input.scale) * torch.tensor(layer.input.zero)
        moved = (torch.tensor(layer.input.ratio or (1.0,)) * shift.double())[:, None] * weight.sum(1)
        rounded = torch.tensor(numpy_helper.to_array(tensor)).reshape(moved.shape)
        exact = -moved  # a MatMul's own bias is an Add behind it
        if bias is not None and _relative(rounded, exact) > 1e-6:
            exact = bias.detach().double() - moved
        assert _relative(rounded, exact) < 1e-6
        tensor.CopyFrom(numpy_helper.from_array(exact.reshape(*tensor.dims).numpy(), tensor.name))


def _run(model: onnx.ModelProto, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the graph's output, and the sines and cosines of `t` that it begins with."""
    graph = model.graph
    (sines,) = (node.input[0] for node in graph.node if "unet.time_embedding.linear_1.weight" in node.input)
    graph.output.append(helper.make_tensor_value_info(sines, TensorProto.DOUBLE, None))
    out, embedding = ReferenceEvaluator(model).run(None, {"x": x.numpy(), "t": t.numpy()})
    return torch.from_numpy(out), torch.from_numpy(embedding)


def _fake_in_float64(model: LoadedModel, plan: QuantPlan, embedding: Tensor) -> torch.nn.Module:
    """Return the fake-quantized network with nothing rounded to float32: not its weights, nor its sines of t."""
    fake = fake_quantized(model.network, plan).double().requires_grad_(False)
    for name, layer in plan.layers.items():
        fake.get_submodule(name).weight.copy_(dequantize_weight(layer.codes, layer.weight_scale.double()))
    fake.get_submodule("unet.time_proj").register_forward_hook(lambda *_: embedding)
    return fake
