"""TensorRT-RTX builds and is audited without a GPU, and refuses in one line what it cannot build."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from engines import (
    Audit,
    EngineConfig,
    EngineError,
    Portable,
    build,
    driver,
    load_engine_file,
    nvinfer,
    open_engine,
    trt_rtx,
)
from engines.driver import Gpu, no_gpu
from engines.graph import read_onnx

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
CODES = 16 * 16 * 9 + 16 * 16


def make(onnx_path, **config):
    return build(onnx_path, onnx_path.parent / "unet.plan", EngineConfig(backend="tensorrt-rtx", **config))


@pytest.mark.rtx
@needs_rtx
@pytest.mark.parametrize("targets", [(), ("sm89",)])
def test_the_int4_cast_form_keeps_int4_weights_and_runs_int8(tiny_onnx, targets):
    audit = make(tiny_onnx("int4cast"), targets=targets).audit
    kernels = {kernel.name: (kernel.kind, kernel.precision) for kernel in audit.kernels}
    assert kernels == {
        "node_conv_in": ("convolution", "float32"),
        "node_conv": ("convolution", "int8"),
        "node_linear": ("matmul", "int8"),
    }
    assert audit.weight_bytes["int4"] == CODES // 2
    assert audit.weight_bytes.keys() == {"int4", "float32"}


@pytest.mark.rtx
@needs_rtx
def test_an_engine_that_cannot_run_here_says_why(tiny_onnx):
    file = make(tiny_onnx("int8"))
    assert file.audit.weight_bytes["int8"] == CODES
    if no_gpu() is None:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(EngineError, match=r"built for tensorrt-rtx, which cannot run here: no NVIDIA \w+ here"):
        open_engine(file)


@pytest.mark.rtx
@needs_rtx
def test_a_crash_of_the_builder_is_a_one_line_error(computed_scale_onnx):
    with pytest.raises(
        EngineError, match=r"^tensorrt-rtx: the builder crashed \(SIGSEGV\) \(.*'node_\w+', \w+, .*computed.*\.$"
    ):
        make(computed_scale_onnx)
    assert not (computed_scale_onnx.parent / "unet.plan").exists()


@pytest.mark.skipif(no_gpu() is None, reason="this machine has an NVIDIA GPU")
@pytest.mark.rtx
@needs_rtx
def test_weights_can_be_left_out_only_where_there_is_a_gpu(tiny_onnx):
    with pytest.raises(EngineError, match=r"^tensorrt-rtx cannot leave out the weights without a GPU: no NVIDIA"):
        make(tiny_onnx("int8"), stripped=True)
    with pytest.raises(EngineError, match=r"^openvino keeps the weights in the engine; only tensorrt and tensorrt-rtx"):
        build(tiny_onnx("int8"), "unet.plan", EngineConfig(backend="openvino", stripped=True))


@pytest.mark.rtx
@needs_rtx
def test_a_graph_the_builder_refuses_is_a_one_line_error(tiny_onnx):
    with pytest.raises(EngineError, match=r"^tensorrt-rtx cannot build this model: .*dtype == W\.type\(\).*$"):
        make(tiny_onnx("int4"))


@pytest.mark.parametrize(("capability", "targets", "warned"), [
    ("9.0", (), True), ("10.0", (), True), ("10.3", (), True), ("9.0", ("sm89",), False), ("8.9", (), False),
    ("12.0", (), False),
])  # fmt: skip
def test_a_gpu_that_it_does_not_run_on_is_named_before_the_build(tiny_onnx, monkeypatch, capability, targets, warned):
    gpu = Gpu(name="NVIDIA X100", capability=capability, memory_bytes=1, cuda="13.0")
    monkeypatch.setattr(driver, "gpus", lambda: (gpu,))
    monkeypatch.setattr(trt_rtx, "cannot_build", lambda: None)
    monkeypatch.setattr(nvinfer, "build", lambda *args: Audit(kernels=(), weight_bytes={}))
    graph, config = read_onnx(tiny_onnx("int8")), EngineConfig(backend="tensorrt-rtx", targets=targets)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trt_rtx.build(graph, tiny_onnx("int8").with_name("unet.plan"), config)
    line = (
        f"tensorrt-rtx does not run on the NVIDIA X100 (compute capability {capability}): use tensorrt here. The "
        "engine is for another machine"
    )
    assert [str(w.message) for w in caught] == [line] * warned
    assert (trt_rtx.cannot_run() or "").startswith(line[:60]) == (capability[:2] in ("9.", "10"))


@pytest.mark.rtx
@needs_rtx
def test_a_portable_engine_says_what_that_costs(tiny_onnx):
    file = make(tiny_onnx("int4cast"), portable=("gpu",))
    assert load_engine_file(file.path) == file
    assert file.portable == (Portable.GPU,)
    cost = file.audit.portability
    assert cost.bytes == file.path.stat().st_size
    assert 0.9 < cost.bytes / cost.plain_bytes < 1.5
    if trt_rtx.cannot_run() is not None:
        assert str(cost).endswith("; time not measured, since it cannot run here")


@pytest.mark.parametrize(("config", "message"), [
    ({"portable": ("version",)}, r"^tensorrt-rtx has no engines for other versions of it: build again for each"),
    ({"portable": ("gpu",), "targets": ("sm89",)}, r"^A portable engine is for all GPUs from Ampere on: leave out"),
])  # fmt: skip
def test_what_cannot_be_portable_is_refused(tiny_onnx, config, message):
    graph, config = read_onnx(tiny_onnx("int8")), EngineConfig(backend="tensorrt-rtx", **config)
    with pytest.raises(EngineError, match=message):
        trt_rtx.build(graph, Path("unet.plan"), config)


def test_backends_without_portable_engines_refuse_them(tiny_onnx):
    with pytest.raises(EngineError, match=r"^openvino has no portable engines \(gpu\); only tensorrt and tensorrt-rtx"):
        build(tiny_onnx("int8"), "unet.plan", EngineConfig(backend="openvino", portable=("gpu",)))


@pytest.mark.rtx
@needs_rtx
def test_an_unknown_target_is_refused_with_the_list(tiny_onnx):
    with pytest.raises(
        EngineError, match=r"Unknown tensorrt-rtx targets \['sm90'\]\. Choose from \['sm75', .*'sm121'\]"
    ):
        make(tiny_onnx("float"), targets=("sm89", "sm90"))
