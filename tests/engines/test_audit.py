"""The layer list of TensorRT is read for what it says and no more."""

from engines.audit import name_kernels, read_layer_list
from engines.base import Kernel, LayerKind


def test_a_layer_that_a_runtime_split_has_all_its_precisions_and_one_it_does_not_mention_none() -> None:
    layers = {"conv": LayerKind.CONVOLUTION, "linear": LayerKind.MATMUL}
    assert name_kernels(layers, {"conv": {"int8", "float32"}}) == (
        Kernel(name="conv", kind=LayerKind.CONVOLUTION, precision="float32+int8"),
        Kernel(name="linear", kind=LayerKind.MATMUL, precision="unknown"),
    )


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
