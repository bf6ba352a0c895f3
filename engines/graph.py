"""Read an ONNX file for building: checked, every node named; say what weights it has; write it down as a plan.

In: an ONNX file, with or without external data. Out: a model, its tensors, its weight layers and weight bytes. Names
matter because every runtime reports its kernels by the ONNX nodes they came from. Protobuf ends at 2 GB, so weights
beyond that are never read into the model: they stay in their files, and are copied from there.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from engines.base import TensorSpec
from engines.errors import EngineError
from engines.files import data_path

# Operators that multiply activations by weights: (kind, positions of the two factors, dtype of the arithmetic, None if
# it is that of the factors). All but the first four are what ONNX Runtime's optimiser writes.
MATRIX_OPS: dict[str, tuple[str, tuple[int, int], str | None]] = {
    "Conv": ("convolution", (0, 1), None),
    "ConvTranspose": ("convolution", (0, 1), None),
    "Gemm": ("matmul", (0, 1), None),
    "MatMul": ("matmul", (0, 1), None),
    "FusedConv": ("convolution", (0, 1), None),
    "FusedGemm": ("matmul", (0, 1), None),
    "FusedMatMul": ("matmul", (0, 1), None),
    "MatMulNBits": ("matmul", (0, 1), None),
    "ConvInteger": ("convolution", (0, 1), "int8"),
    "MatMulInteger": ("matmul", (0, 1), "int8"),
    "MatMulIntegerToFloat": ("matmul", (0, 1), "int8"),
    "DynamicQuantizeMatMul": ("matmul", (0, 1), "int8"),
    "QLinearConv": ("convolution", (0, 3), "int8"),
    "QLinearMatMul": ("matmul", (0, 3), "int8"),
    "QGemm": ("matmul", (0, 3), "int8"),
}
ONE_FILE_BYTES = 1_900_000_000  # of weights; more lie in a file of their own
_PAGE = 4096  # bytes; runtimes map weights into memory, where a float wants to lie at a multiple of its size


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """A checked model; if its weights do not go into one file they are not in it, but in files in `folder`."""

    model: onnx.ModelProto
    folder: Path

    @property
    def apart(self) -> bool:
        """Whether weights lie in files of their own."""
        return any(map(onnx.external_data_helper.uses_external_data, self.model.graph.initializer))

    def save(self, path: Path) -> None:
        """Write the model to `path`, and weights that lie apart to `data_path(path)`."""
        if not self.apart:
            path.write_bytes(self.model.SerializeToString(deterministic=True))
            return
        import onnx_ir as ir

        held = ir.from_proto(self.model)
        ir.external_data.set_base_dir(held.graph, self.folder)
        ir.save(held, path, "protobuf", external_data=data_path(path).name, alignment=_PAGE, align_threshold=0)


def read_onnx(path: str | Path) -> OnnxGraph:
    """Load an ONNX file with its external data, check it, and give a name to every node that lacks its own.

    Raises:
        EngineError: The file is missing, or not a valid ONNX model.
    """
    folder = Path(path).parent
    try:
        Path(path).open("rb").close()  # the checker does not say why a file cannot be read
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        if sum(initializer_bytes(model).values()) <= ONE_FILE_BYTES:
            onnx.load_external_data_for_model(model, str(folder))
    except OSError as error:
        raise EngineError(f"Cannot read the ONNX file {path}: {error.strerror or error}.") from None
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path} is not a valid ONNX model ({reason}). Export it again.") from None
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_at_{index}"
        seen.add(node.name)
    return OnnxGraph(model=model, folder=folder)


def tensor_specs(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the graph's inputs and outputs.

    Raises:
        EngineError: An input has a dynamic dimension other than its first.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in constants)
    for spec in inputs:
        if None in spec.shape[1:]:
            raise EngineError(f"Input {spec.name!r} has shape {spec.shape}; only the first (batch) may be dynamic.")
    return inputs, tuple(_spec(value) for value in model.graph.output)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)


def weight_layers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the nodes that multiply an activation by a constant, by name.

    A value is constant when it is an initializer or computed from constants only, so weights behind
    `DequantizeLinear`, `Cast`, `Transpose` or `Reshape` count.
    """
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    layers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:  # in topological order, as ONNX requires
        if all(name in constants for name in node.input):
            constants.update(node.output)
        elif node.op_type in MATRIX_OPS:
            first, second = (node.input[i] in constants for i in MATRIX_OPS[node.op_type][1])
            if first != second:
                layers[node.name] = node
    return layers


def layer_kinds(model: onnx.ModelProto) -> dict[str, str]:
    """Return the kind ("convolution" or "matmul") of each weight layer, by name."""
    return {name: MATRIX_OPS[node.op_type][0] for name, node in weight_layers(model).items()}


def initializer_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of all initializers by element type; INT4 counts packed, two values to a byte."""
    held: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        values = 1
        for size in tensor.dims:
            values *= size
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        bits = 4 if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 8 * dtype.itemsize
        held[dtype.name] += (values * bits + 7) // 8
    return dict(held)
