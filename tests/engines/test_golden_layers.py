"""By topic, over several modules: a small graph for each rule of Q/DQ placement, and what TensorRT-RTX makes of it.

These are the rules that `gaq_export.graph.qdq` follows. A new version of the builder that breaks one shows here.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engines import EngineConfig, EngineError, build
from tests.engines.conftest import ACTIVATION_SCALE, Graph, Tensors

C = 32
IMAGE: Tensors = {"x": (TensorProto.FLOAT, ["batch", C, 8, 8])}
TWO: Tensors = IMAGE | {"z": (TensorProto.FLOAT, ["batch", C, 8, 8])}
STEPS: Tensors = IMAGE | {"step": (TensorProto.INT64, [1])}
ROWS: Tensors = {"x": (TensorProto.FLOAT, ["batch", C, C])}
OUT: Tensors = {"y": (TensorProto.FLOAT, ["batch", C, 8, 8])}
MERGED: Tensors = {name: (TensorProto.FLOAT, ["batch", C, C]) for name in "qkv"}
INT8, FLOAT = ["int8"], ["float32"]

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt_rtx is not installed: pip install tensorrt-rtx",
    ),
]


def _conv(g: Graph, x: str, out: str, form: str = "int8", channels: int = C, name: str = "w") -> str:
    return g.add("Conv", [x, g.weight(name, form, (C, channels, 3, 3), axis=0)], out, pads=[1, 1, 1, 1])


def _rounded(g: Graph, value: str, scale: float = float(ACTIVATION_SCALE), zero: int = 0) -> str:
    s, z = g.constant(f"{value}.s", np.float32(scale)), g.constant(f"{value}.z", np.int8(zero))
    return g.add("DequantizeLinear", [g.add("QuantizeLinear", [value, s, z], f"{value}.q"), s, z], f"{value}.dq")


def _row(g: Graph, name: str, values: Sequence[float]) -> str:
    table = g.constant(f"{name}.rows", np.array(values, np.float32).reshape(-1, 1, 1, 1))
    return g.add("Gather", [table, "step"], name)


def plain(g: Graph, form: str = "int8") -> None:
    _conv(g, _rounded(g, "x"), "y", form)


def cast_form(g: Graph) -> None:
    plain(g, "int4cast")


def shifted(g: Graph) -> None:
    padded = g.add("Pad", ["x", g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "padded")
    moved = g.add("Add", [padded, g.constant("shift", np.float32(-1.5))], "moved")
    y = g.add("Conv", [_rounded(g, moved), g.weight("w", "int4cast", (C, C, 3, 3), axis=0)], "conv")
    g.add("Add", [y, g.constant("bias", np.ones((1, C, 1, 1), np.float32))], "y")


def ratio(g: Graph) -> None:
    r = _row(g, "ratio", [1.0, 0.5, 0.25])
    y = _conv(g, _rounded(g, g.add("Div", ["x", r], "divided")), "conv", "int4cast")
    g.add("Mul", [y, r], "y")


def ratio_and_shift(g: Graph) -> None:
    r, c = _row(g, "ratio", [1.0, 0.5, 0.25]), _row(g, "shift", [-1.5, -1.0, 0.5])
    padded = g.add("Pad", ["x", g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "padded")
    moved = g.add("Add", [g.add("Div", [padded, r], "divided"), c], "moved")
    y = g.add("Conv", [_rounded(g, moved), g.weight("w", "int4cast", (C, C, 3, 3), axis=0)], "conv")
    g.add("Add", [g.add("Mul", [y, r], "back"), _row(g, "bias", [0.1, 0.2, 0.3])], "y")


def q_after_concat(g: Graph) -> None:
    _conv(g, _rounded(g, g.add("Concat", ["x", "z"], "both", axis=1)), "y", channels=2 * C)


def equal_scales_before_concat(g: Graph) -> None:
    _conv(g, g.add("Concat", [_rounded(g, "x"), _rounded(g, "z")], "both", axis=1), "y", channels=2 * C)


def other_scales_before_concat(g: Graph) -> None:
    _conv(g, g.add("Concat", [_rounded(g, "x"), _rounded(g, "z", 0.02)], "both", axis=1), "y", channels=2 * C)


def two_convolutions(g: Graph) -> None:
    first, second = _conv(g, _rounded(g, "x"), "a", name="w1"), _conv(g, _rounded(g, "z", 0.02), "b", name="w2")
    g.add("Add", [first, second], "y")


def _upsampled(g: Graph, x: str) -> str:
    scales = g.constant("scales", np.array([1, 1, 2, 2], np.float32))
    return g.add(
        "Resize",
        [x, "", scales],
        "up",
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )


def q_after_resize(g: Graph) -> None:
    g.add(
        "Conv",
        [_rounded(g, _upsampled(g, "x")), g.weight("w", "int8", (C, C, 3, 3), axis=0)],
        "y",
        pads=[1] * 4,
        strides=[2, 2],
    )


def q_before_resize(g: Graph) -> None:
    g.add(
        "Conv",
        [_upsampled(g, _rounded(g, "x")), g.weight("w", "int8", (C, C, 3, 3), axis=0)],
        "y",
        pads=[1] * 4,
        strides=[2, 2],
    )


def attention_projections(g: Graph) -> None:
    x = _rounded(g, "x")
    for name in "qkv":
        g.add("MatMul", [x, g.weight(f"w{name}", "int4cast", (C, C), axis=1)], name)


GOLDEN: dict[str, tuple[Callable[[Graph], None], Tensors, Tensors, list[str]]] = {
    "INT8 weights": (plain, IMAGE, OUT, INT8),
    "packed INT4 weights, cast": (cast_form, IMAGE, OUT, INT8),
    "a grid moved off 0": (shifted, IMAGE, OUT, INT8),
    "a grid for each step": (ratio, STEPS, OUT, INT8),
    "a grid for each step, moved off 0": (ratio_and_shift, STEPS, OUT, INT8),
    "one Q behind a concat": (q_after_concat, TWO, OUT, INT8),
    "equal scales before a concat": (equal_scales_before_concat, TWO, OUT, INT8),
    "other scales before a concat": (other_scales_before_concat, TWO, OUT, FLOAT),
    "two convolutions in place of a concat": (two_convolutions, TWO, OUT, INT8 * 2),
    "Q behind a nearest resize": (q_after_resize, IMAGE, OUT, INT8),
    "Q before a nearest resize": (q_before_resize, IMAGE, OUT, FLOAT),
    "one Q for query, key and value": (attention_projections, ROWS, MERGED, INT8 * 3),
}


def _write(folder: Path, make: Callable[[Graph], None], inputs: Tensors, outputs: Tensors) -> Path:
    graph = Graph()
    make(graph)
    onnx.save(graph.model(inputs, outputs), folder / "graph.onnx")
    return folder / "graph.onnx"


@pytest.mark.parametrize("rule", GOLDEN)
def test_the_builder_makes_of_a_graph_what_the_rule_says(rule: str, tmp_path: Path) -> None:
    make, inputs, outputs, wanted = GOLDEN[rule]
    config = EngineConfig(backend="tensorrt-rtx", targets=("sm89",))
    audit = build(_write(tmp_path, make, inputs, outputs), tmp_path / "unet.plan", config).audit
    assert [kernel.precision for kernel in audit.kernels] == wanted, audit


def test_a_gpu_before_ampere_multiplies_in_float(tmp_path: Path) -> None:
    config = EngineConfig(backend="tensorrt-rtx", targets=("sm75",))
    audit = build(_write(tmp_path, plain, IMAGE, OUT), tmp_path / "unet.plan", config).audit
    assert "int8" not in [kernel.precision for kernel in audit.kernels], audit


def int4_cast_at_once(g: Graph) -> None:
    _conv(g, _rounded(g, "x"), "y", "int4cast")
    unpacked = next(node for node in g.nodes if node.op_type == "Cast")
    g.nodes.remove(next(node for node in g.nodes if node.output[0] == unpacked.input[0]))
    unpacked.input[0] = "w.codes"


def a_zero_point(g: Graph) -> None:
    _conv(g, _rounded(g, "x", zero=3), "y")


@pytest.mark.parametrize(
    ("make", "words"), [(int4_cast_at_once, "cannot build this model: .*"), (a_zero_point, "zero point")]
)
def test_a_form_that_the_builder_refuses_is_one_line(make: Callable[[Graph], None], words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        build(_write(tmp_path, make, IMAGE, OUT), tmp_path / "unet.plan", EngineConfig(backend="tensorrt-rtx"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "unet.plan").exists()
