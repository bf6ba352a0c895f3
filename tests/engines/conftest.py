"""A tiny network with one float convolution, one quantized convolution and one quantized linear layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import EngineConfig, EngineFile, build

CHANNELS = 16
ACTIVATION_SCALE = np.float32(0.05)


Tensors = dict[str, tuple[int, list[Any]]]  # by name: element type and shape


class Graph:
    """Collects nodes and initializers, and gives every node a name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def quantized(self, value: str) -> str:
        scale = self.constant(f"{value}.scale", ACTIVATION_SCALE)
        zero = self.constant(f"{value}.zero", np.int8(0))
        self.add("QuantizeLinear", [value, scale, zero], f"{value}.q")
        return self.add("DequantizeLinear", [f"{value}.q", scale, zero], f"{value}.dq")

    def weight(self, name: str, form: str, shape: tuple[int, ...], axis: int) -> str:
        """Add a 4-bit weight in one of its forms: plain float, INT8, INT4, or INT4 through a cast to INT8."""
        rng = np.random.default_rng(len(name))
        codes = rng.integers(-8, 8, shape).astype(np.int8)
        scale = rng.uniform(0.01, 0.02, shape[axis]).astype(np.float32)
        if form == "float":
            along = [-1 if i == axis else 1 for i in range(len(shape))]
            return self.constant(name, codes * scale.reshape(along))
        self.constant(f"{name}.scale", scale)
        if form == "int8":
            self.constant(f"{name}.codes", codes)
        else:
            self.constants.append(helper.make_tensor(f"{name}.codes", TensorProto.INT4, shape, codes.flatten()))
        last = f"{name}.codes"
        if form == "int4cast":
            self.add("DequantizeLinear", [last, self.constant(f"{name}.one", np.float32(1))], f"{name}.float")
            last = self.add("Cast", [f"{name}.float"], f"{name}.int8", to=TensorProto.INT8)
        return self.add("DequantizeLinear", [last, f"{name}.scale"], f"{name}.dq", axis=axis)

    def model(self, inputs: Tensors, outputs: Tensors) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tiny_model(form: str, quantize_outputs: bool = False) -> onnx.ModelProto:
    """Return eps(x, t): conv_in (float), conv and linear (4-bit weights, INT8 activations unless form is float)."""
    g = Graph()
    quantized = g.quantized if form != "float" else (lambda value: value)
    rng = np.random.default_rng(0)
    w_in = g.constant("w_in", rng.normal(0, 0.2, (CHANNELS, 4, 3, 3)).astype(np.float32))
    g.add("Conv", ["x", w_in], "conv_in", pads=[1, 1, 1, 1])
    bias = g.constant("bias", rng.normal(0, 0.2, CHANNELS).astype(np.float32))
    weight = g.weight("w_conv", form, (CHANNELS, CHANNELS, 3, 3), axis=0)
    y = g.add("Conv", [quantized("conv_in"), weight, bias], "conv", pads=[1, 1, 1, 1])
    y = g.quantized(y) if quantize_outputs else y
    g.add("Cast", ["t"], "t_float", to=TensorProto.FLOAT)
    g.add("Mul", ["t_float", g.constant("hundredth", np.float32(0.01))], "t_small")
    g.add("Reshape", ["t_small", g.constant("column", np.array([-1, 1, 1, 1]))], "t_column")
    g.add("Add", [y, "t_column"], "timed")
    g.add("ReduceMean", ["timed", g.constant("spatial", np.array([2, 3]))], "pooled", keepdims=0)
    g.add("MatMul", [quantized("pooled"), g.weight("w_linear", form, (CHANNELS, CHANNELS), axis=1)], "linear")
    g.add("Reshape", ["linear", g.constant("image", np.array([-1, CHANNELS, 1, 1]))], "linear_image")
    g.add("Add", ["timed", "linear_image"], "eps")
    inputs = {"x": (TensorProto.FLOAT, ["batch", 4, 8, 8]), "t": (TensorProto.INT64, ["batch"])}
    return g.model(inputs, {"eps": (TensorProto.FLOAT, ["batch", CHANNELS, 8, 8])})


def computed_scale_model() -> onnx.ModelProto:
    """Return a network whose activation scale is looked up by an input."""
    g = Graph()
    g.add("Gather", [g.constant("table", np.linspace(0.01, 0.1, 10, dtype=np.float32)), "step"], "scale")
    zero = g.constant("zero", np.int8(0))
    g.add("QuantizeLinear", ["x", "scale", zero], "x.q")
    g.add("DequantizeLinear", ["x.q", "scale", zero], "x.dq")
    g.add("Conv", ["x.dq", g.weight("w_conv", "int8", (CHANNELS, CHANNELS, 3, 3), axis=0)], "y", pads=[1, 1, 1, 1])
    inputs = {"x": (TensorProto.FLOAT, ["batch", CHANNELS, 8, 8]), "step": (TensorProto.INT64, [])}
    return g.model(inputs, {"y": (TensorProto.FLOAT, ["batch", CHANNELS, 8, 8])})


def tiny_feeds(batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return seeded inputs of the tiny network."""
    x = np.random.default_rng(7).standard_normal((batch, 4, 8, 8)).astype(np.float32)
    return {"x": x, "t": np.arange(batch, dtype=np.int64) * 10}


@pytest.fixture
def tiny_onnx(tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny network in a given form and return its path."""

    def write(form: str, quantize_outputs: bool = False) -> Path:
        path = tmp_path / f"tiny_{form}_{quantize_outputs}.onnx"
        onnx.save(tiny_model(form, quantize_outputs), path)
        return path

    return write


@pytest.fixture
def computed_scale_onnx(tmp_path: Path) -> Path:
    """Write the network that the TensorRT-RTX builder crashes on."""
    path = tmp_path / "computed_scale.onnx"
    onnx.save(computed_scale_model(), path)
    return path


@pytest.fixture
def feeds() -> Callable[[int], dict[str, npt.NDArray[Any]]]:
    """Return the function that makes inputs for a batch size."""
    return tiny_feeds


@pytest.fixture(scope="session")
def walker(tmp_path_factory) -> Callable[[str], EngineFile]:
    """Return what builds x_next = x * table[step] + noise, step_next = step + 1 with a backend."""
    graph = Graph()
    table = graph.constant("table", np.array([0.5, 2.0, -1.0, 0.25], np.float32).reshape(4, 1, 1, 1))
    graph.add("Gather", [table, "step"], "factor")
    graph.add("Mul", ["x", "factor"], "scaled")
    graph.add("Add", ["scaled", "noise"], "x_next")
    graph.add("Add", ["step", graph.constant("one", np.ones(1, np.int64))], "step_next")
    image: list[Any] = ["batch", 1, 4, 4]
    model = graph.model(
        {"x": (TensorProto.FLOAT, image), "step": (TensorProto.INT64, [1]), "noise": (TensorProto.FLOAT, image)},
        {"x_next": (TensorProto.FLOAT, image), "step_next": (TensorProto.INT64, [1])},
    )
    path = tmp_path_factory.mktemp("walker") / "walker.onnx"
    onnx.save(model, path)
    return lambda backend: build(path, path.parent / f"{backend}.plan", EngineConfig(backend=backend, threads=1))
