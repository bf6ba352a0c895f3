"""By topic, from `calib` to the engine: FP8 graphs hold E4M3 numbers that reach as far as the plan's integers.

They compute what PyTorch computes with such numbers.
"""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from calib.affine import round_float8
from calib.fakequant import fake_quantized
from calib.plan import Grid
from engines import EngineConfig, EngineError
from gaq_export import pipeline
from gaq_export.deploy import parity
from gaq_export.deploy.record import record_of
from gaq_export.errors import GaqError
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.models.loader import LoadedModel
from tests.gaq_export.readback import Graph, layer_errors, session


def test_rounding_is_that_of_the_format() -> None:
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    assert numbers[-1] == 448
    x = torch.linspace(-500, 500, 20001)
    distance = (x[:, None] - torch.from_numpy(numbers)).abs()
    assert torch.equal((x - round_float8(x)).abs(), distance.amin(1))


@pytest.mark.parametrize(
    ("grid", "reach"),
    [
        (Grid(scale=0.5, bits=8), 64.0),
        (Grid(scale=0.5, bits=8, zero=(-100,)), 113.5),  # codes from -128 to 127 stand for -14 to 113.5
        (Grid(scale=0.5, bits=8, zero=(-100, 20), ratio=(1.0, 0.5)), 113.5),
    ],
)
def test_the_numbers_reach_as_far_as_the_integers(grid: Grid, reach: float) -> None:
    float8 = grid.float8()
    assert float8.scale * 448 == pytest.approx(reach)
    assert (float8.zero, float8.ratio) == ((0,), grid.ratio)


@pytest.mark.parametrize("form", [{}, {"per_step": True}])
@pytest.mark.parametrize("wbits", [4, 8])
def test_the_graph_computes_what_pytorch_computes(
    wbits: int, form: dict[str, bool], tiny_model: LoadedModel, tiny_graph, tiny_plan, noisy
) -> None:
    plan = tiny_plan(wbits, 8, symmetric=False, **form)
    proto = ir.to_proto(insert_qdq(tiny_graph(), plan, find_profile("trt-fp8")))
    onnx.checker.check_model(proto, full_check=True)
    for n in Graph(proto).quantized():
        codes, wanted = numpy_helper.to_array(n.codes), plan.layers[n.layer].codes.numpy()
        assert n.codes.data_type == TensorProto.FLOAT8E4M3FN
        if wbits == 4:  # such codes are E4M3 numbers
            assert np.array_equal((codes.T if n.axis else codes).astype(np.int8), wanted)
    fake = fake_quantized(tiny_model.network, plan, float8=True)
    if not form:  # a layer alone does not know its step
        assert max(layer_errors(proto, fake, noisy(16)).values()) <= 1e-5
    session_ = session(proto)

    def graph(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session_.run(["eps"], {"x": x.numpy(), "t": t.numpy()})[0])

    result = parity.compare(fake, plan.layers, graph, noisy(16), parity.TOLERANCES["trt-fp8"])
    assert result.passed, result


def test_who_cannot_compute_in_fp8_says_so(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    for backend, numbers, message in (
        ("openvino", "fp8", r"openvino does not compute in fp8; tensorrt and tensorrt-rtx do\."),
        ("openvino", "fp4", r"Unknown numbers 'fp4'\. Did you mean 'fp8'\? Choose one of \['int8', 'fp8'\]\."),
    ):
        with pytest.raises(GaqError, match=message):
            pipeline.build_engine(
                folder=tiny_run,
                out=tmp_path / "unet.plan",
                config=EngineConfig(backend=backend),
                numbers=numbers,
                model=tiny_model,
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_tensorrt_rtx_multiplies_in_fp8(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    def build(*targets: str) -> pipeline.Built:
        config = EngineConfig(backend="tensorrt-rtx", targets=targets)
        out = tmp_path / "unet.plan"
        return pipeline.build_engine(folder=tiny_run, out=out, config=config, numbers="fp8", model=tiny_model)

    for targets, old in ((("sm86", "sm89"), "sm86"), ((), "a portable engine")):
        with pytest.raises(EngineError, match=rf"FP8 needs a later GPU than {old}\. Give targets of"):
            build(*targets)
    built = build("sm89")
    baked = set(record_of(built.file).tables)
    quantized = [kernel for kernel in built.file.audit.kernels if kernel.precision == "float8"]
    assert len(quantized) == len(built.plan.layers.keys() - baked)
    assert built.file.audit.weight_bytes["float8"] == sum(
        layer.codes.numel() for name, layer in built.plan.layers.items() if name not in baked
    )
