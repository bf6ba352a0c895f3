"""Read an ONNX file for building, checked and every node named; list its weight layers; write it as an engine.

In: an ONNX file, with or without external data. Out: a model, its tensors, its weight layers and weight bytes. Names
matter because every runtime reports its kernels by the ONNX nodes that they came from. Protobuf ends at 2 GB, so larger
weights are never read into the model: they stay in their files and are copied from there.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from engines.base import LayerKind, TensorSpec
from engines.errors import EngineError
from engines.files import data_path

_CONV = LayerKind.CONVOLUTION
_MATMUL = LayerKind.MATMUL
# Operators that multiply activations by weights: (kind, positions of the two factors, dtype of the arithmetic, or None
# for that of the factors). ONNX Runtime's optimiser writes all but the first four.
MATRIX_OPS: dict[str, tuple[LayerKind, tuple[int, int], str | None]] = {
    "Conv": (_CONV, (0, 1), None),
    "ConvTranspose": (_CONV, (0, 1), None),
    "Gemm": (_MATMUL, (0, 1), None),
    "MatMul": (_MATMUL, (0, 1), None),
    "FusedConv": (_CONV, (0, 1), None),
    "FusedGemm": (_MATMUL, (0, 1), None),
    "FusedMatMul": (_MATMUL, (0, 1), None),
    "MatMulNBits": (_MATMUL, (0, 1), None),
    "ConvInteger": (_CONV, (0, 1), "int8"),
    "MatMulInteger": (_MATMUL, (0, 1), "int8"),
    "MatMulIntegerToFloat": (_MATMUL, (0, 1), "int8"),
    "DynamicQuantizeMatMul": (_MATMUL, (0, 1), "int8"),
    "QLinearConv": (_CONV, (0, 3), "int8"),
    "QLinearMatMul": (_MATMUL, (0, 3), "int8"),
    "QGemm": (_MATMUL, (0, 3), "int8"),
}
ONE_FILE_BYTES = 1_900_000_000  # more weights than this go to a separate file
_PAGE = 4096  # bytes; runtimes map weights into memory, where a float has to start at a multiple of its size


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """A checked model; weights that do not fit into one file are not in it, but in files in `folder`."""

    model: onnx.ModelProto
    folder: Path

    @property
    def apart(self) -> bool:
        """Whether the weights are in files beside the model."""
        return any(map(onnx.external_data_helper.uses_external_data, self.model.graph.initializer))

    def save(self, path: Path) -> None:
        """Write the model to `path`, and weights in separate files to `data_path(path)`."""
        if not self.apart:
            path.write_bytes(self.model.SerializeToString(deterministic=True))
            return
        import onnx_ir as ir

        # onnx_ir reads one tensor at a time, so a model larger than memory can be copied.
        model = ir.from_proto(self.model)
        ir.external_data.set_base_dir(model.graph, self.folder)
        ir.save(model, path, "protobuf", external_data=data_path(path).name, alignment=_PAGE, align_threshold=0)


def read_onnx(path: str | Path) -> OnnxGraph:
    """Load an ONNX file with its external data, check it, and give every node a name that no other has.

    Raises:
        EngineError: The file is missing, or not a valid ONNX model.
    """
    folder = Path(path).parent
    try:
        Path(path).open("rb").close()  # for the reason: the checker does not say why a file cannot be read
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        if sum(initializer_bytes(model).values()) <= ONE_FILE_BYTES:
            onnx.load_external_data_for_model(model, str(folder))
    except OSError as error:
        raise EngineError(f"Cannot read the ONNX file {path}: {error.strerror or error}.") from None
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path} is not a valid ONNX model ({reason}). Export it again.") from None
    # Runtimes report kernels by node name: a missing or repeated one would hide a layer from the audit.
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

    A value is constant when it is an initializer or computed from constants only, so weights after
    `DequantizeLinear`, `Cast`, `Transpose` or `Reshape` count.
    """
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    layers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:  # in topological order, as ONNX requires
        if all(name in constants for name in node.input):
            constants.update(node.output)
        elif node.op_type in MATRIX_OPS:
            first, second = (node.input[i] in constants for i in MATRIX_OPS[node.op_type][1])
            if first != second:  # one factor is a weight; two activations (attention) are no weight layer
                layers[node.name] = node
    return layers


def layer_kinds(model: onnx.ModelProto) -> dict[str, LayerKind]:
    """Return the kind of each weight layer, by name."""
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
