"""In 16 bits a graph computes nearly the same, and what must stay float32 does."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from calib.fakequant import fake_quantized
from calib.sqnr import sqnr_db
from gaq_export.deploy.parity import TOLERANCES, Tolerance, compare
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.precision import compute_in
from gaq_export.graph.profiles import PROFILES
from gaq_export.graph.qdq import insert_qdq
from gaq_export.graph.step import make_step
from gaq_export.models.loader import LoadedModel
from tests.gaq_export.readback import Graph, session

SPEC = SamplerSpec(steps=5)


@pytest.fixture(scope="module")
def fresh(tiny_model: LoadedModel, tiny_graph: Callable[[], ir.Model]) -> Callable[[str], ir.Model]:
    """What gives a fresh float graph of a kind."""

    def make(kind: str) -> ir.Model:
        model = tiny_graph()
        if kind == "step":
            make_step(model, tiny_model.schedule, SPEC)
        return model

    return make


@pytest.mark.parametrize("kind", ["eps", "step"])
def test_half_precision_predicts_the_noise_to_a_thousandth(kind: str, fresh, tiny_model: LoadedModel, noisy) -> None:
    proto = ir.to_proto(compute_in(fresh(kind), "float16"))
    onnx.checker.check_model(proto, full_check=True)
    x, t = noisy(16).x, torch.full((8,), 60)
    feeds = {"x": x.numpy()} | ({"t": t.numpy()} if kind == "eps" else {"step": np.array([1])})
    with torch.no_grad():
        expected = tiny_model.network(x, t)
    epsilon = torch.from_numpy(session(proto).run(["eps"], feeds)[0])
    assert epsilon.dtype == torch.float32
    assert sqnr_db(expected, epsilon) > 60


def test_the_step_of_the_sampler_and_what_depends_on_t_alone_stay_float32(fresh) -> None:
    step, eps = (Graph(ir.to_proto(compute_in(fresh(kind), "float16"))) for kind in ("step", "eps"))
    tables = {name: t.data_type for name, t in step.constants.items() if name.startswith("update.")}
    assert {t for name, t in tables.items() if name != "update.one"} == {TensorProto.FLOAT}
    weights = {name: t.data_type for name, t in eps.constants.items() if name.endswith("weight")}
    wide = {name for name, kind in weights.items() if kind == TensorProto.FLOAT}
    assert {TensorProto.FLOAT16} == {kind for name, kind in weights.items() if name not in wide}
    assert {"unet.time_embedding.linear_1.weight", "unet.time_embedding.linear_2.weight"} <= wide
    assert all("time_emb" in name for name in wide)


@pytest.mark.parametrize(("compute", "kind"), [("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16)])
def test_a_quantized_graph_keeps_its_integers_and_takes_its_scales_along(
    compute: str, kind: int, fresh, tiny_plan
) -> None:
    plan = tiny_plan(4, 8)
    wide = Graph(ir.to_proto(insert_qdq(fresh("eps"), plan, PROFILES["trt"])))
    narrow = Graph(ir.to_proto(compute_in(insert_qdq(fresh("eps"), plan, PROFILES["trt"]), compute)))
    for name, tensor in wide.constants.items():
        if tensor.data_type in (TensorProto.INT4, TensorProto.INT8):
            assert narrow.constants[name].raw_data == tensor.raw_data
        elif name.endswith("scale"):
            assert narrow.constants[name].data_type == kind
            exact, near = numpy_helper.to_array(tensor), numpy_helper.to_array(narrow.constants[name])
            assert np.allclose(near.astype(np.float32), exact, rtol=2e-3 if compute == "float16" else 1e-2)


def test_a_constant_beyond_the_type_is_an_error(fresh) -> None:
    model = fresh("eps")
    value = next(v for name, v in model.graph.initializers.items() if name.endswith("conv1.weight"))
    value.const_value = ir.tensor(np.full(value.shape, 1e6, np.float32), name=value.name)
    with pytest.raises(GaqError, match=r"float16 cannot hold .*conv1.weight' \(largest 1e\+06\): use float32"):
        compute_in(model, "float16")
    assert ml_dtypes.finfo(ml_dtypes.bfloat16).max > 1e6
    compute_in(model, "bfloat16")


def test_float32_changes_nothing_and_another_type_is_an_error(fresh) -> None:
    before = ir.to_proto(fresh("eps")).SerializeToString(deterministic=True)
    assert ir.to_proto(compute_in(fresh("eps"), "float32")).SerializeToString(deterministic=True) == before
    with pytest.raises(GaqError, match=r"Unknown compute type 'int8'. Choose one of \['float32', 'float16', 'bfl"):
        compute_in(fresh("eps"), "int8")


@pytest.mark.parametrize("profile", ["trt", "ort-cuda"])
def test_a_quantized_graph_in_16_bits_comes_as_close_as_its_rounding_allows(
    profile: str, fresh, tiny_model: LoadedModel, tiny_plan, noisy
) -> None:
    plan = tiny_plan(4, 8, symmetric=False)
    session_ = session(ir.to_proto(compute_in(insert_qdq(fresh("eps"), plan, PROFILES[profile]), "float16")))

    def graph(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session_.run(["eps"], {"x": x.numpy(), "t": t.numpy()})[0])

    fake = fake_quantized(tiny_model.network, plan)
    result = compare(fake, plan.layers, graph, noisy(16), TOLERANCES[profile], compute="float16")
    assert result.passed, result
    assert not compare(fake, plan.layers, graph, noisy(16), Tolerance(floor_db=60.0, margin_db=0.0)).passed
