"""TensorRT-RTX builds and is audited without a GPU; its layer list is read for what it says and no more."""

import importlib.util

import pytest

from engines import EngineConfig, EngineError, build, open_engine
from engines.audit import read_layer_list
from engines.nvinfer import no_gpu

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
def test_a_plan_that_cannot_run_here_says_why(tiny_onnx):
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
    with pytest.raises(EngineError, match=r"^openvino keeps the weights in the plan; only tensorrt and tensorrt-rtx"):
        build(tiny_onnx("int8"), "unet.plan", EngineConfig(backend="openvino", stripped=True))


@pytest.mark.rtx
@needs_rtx
def test_a_graph_the_builder_refuses_is_a_one_line_error(tiny_onnx):
    with pytest.raises(EngineError, match=r"^tensorrt-rtx cannot build this model: .*dtype == W\.type\(\).*$"):
        make(tiny_onnx("int4"))


@pytest.mark.rtx
@needs_rtx
def test_an_unknown_target_is_refused_with_the_list(tiny_onnx):
    with pytest.raises(
        EngineError, match=r"Unknown tensorrt-rtx targets \['sm90'\]\. Choose from \['sm75', .*'sm121'\]"
    ):
        make(tiny_onnx("float"), targets=("sm89", "sm90"))


def tensor(name, dims, dtype):
    return (
        f"{{ Name: {name}, Dimensions: {dims}, Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) }}"
    )


def layer(name, kind, inputs, constants, nodes):
    operands = f"Inputs: [ {', '.join(inputs)}], Constants: [ {', '.join(constants)}]"
    operands += f", Outputs: [ {tensor('o', '[1]', 'Half')}]"
    return f"Name: {name}, LayerType: {kind}, {operands}, Metadata: " + "".join(f"[ONNX Layer: {n}]" for n in nodes)


def log(*layers, total=1000):
    return f"Total Weights Memory: {total} bytes\nLayers:\n" + "\n".join(layers) + "\n\nI/O Tensors:\n"


def test_layers_merged_into_one_kernel_count_each():
    inputs = [tensor("a", "[-1,8]", "Int8"), tensor("w", "[8,24]", "Int8")]
    merged = layer("q+k+v", "gemm", inputs, [tensor("alpha", "[1]", "Float")], ["q", "k", "v"])
    attention = layer("qk", "gemm", [tensor("q", "[-1,8]", "Float"), tensor("k", "[-1,8]", "Float")], [], ["scores"])
    audit = read_layer_list(log(merged, attention), {"q": "matmul", "k": "matmul", "v": "matmul"})
    assert audit.counts == {("matmul", "int8"): 3}


def test_a_kernel_is_int8_only_if_activation_and_weight_both_are():
    fallback = layer(
        "conv", "correlation", [tensor("a", "[-1,8,4,4]", "Half")], [tensor("w", "[8,8,3,3]", "Int8")], ["conv"]
    )
    assert read_layer_list(log(fallback), {"conv": "convolution"}).counts == {("convolution", "float16xint8"): 1}
    bias_first = [tensor("b", "[1,8]", "Float"), tensor("w", "[8,8]", "Int8")]
    fused = layer("fc", "runtime_fusion", [tensor("a", "[-1,8]", "Int8")], bias_first, ["fc"])
    assert read_layer_list(log(fused), {"fc": "matmul"}).counts == {("matmul", "int8"): 1}


def test_a_layer_the_list_does_not_name_is_unknown():
    audit = read_layer_list("no list at all", {"conv": "convolution"})
    assert audit.counts == {("convolution", "unknown"): 1}
    assert audit.weight_bytes == {}
    assert "1 of 1 weight layers are not in the layer list" in audit.note


def test_weights_are_split_by_type_only_if_the_list_allows_it():
    packed = layer("unpack", "kgen", [], [tensor("w", "[8,8,3,3]", "Int4"), tensor("s", "[8]", "Float")], [])
    assert read_layer_list(log(packed), {}).weight_bytes == {"int4": 288, "float32": 712}
    odd = layer("unpack", "kgen", [], [tensor("w", "[8]", "Int3")], [])
    assert read_layer_list(log(packed, odd), {}).weight_bytes == {"total": 1000}
    assert read_layer_list(log(packed, total=100), {}).weight_bytes == {"total": 100}
