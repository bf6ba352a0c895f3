"""What a runtime says it made of a network: the arithmetic of each weight layer, and the weights that it holds.

In: the weight layers of the ONNX graph, and the runtime's report (here TensorRT's layer list). Out: an `Audit`. A layer
that the report does not mention counts as "unknown": an audit that guessed would hide the very fallback to floating
point that it is there to show.
"""

import re
from collections import Counter
from collections.abc import Mapping
from math import prod

from engines.base import Audit, Kernel, LayerKind

UNKNOWN = "unknown"


def name_kernels(layers: Mapping[str, LayerKind], precisions: Mapping[str, set[str]]) -> tuple[Kernel, ...]:
    """Join the weight layers of a graph with the precisions that a runtime reports for them.

    Args:
        layers: Kind of each weight layer, by node name.
        precisions: Precisions of the kernels that a layer became, by node name; several where a runtime split it.
    """
    return tuple(
        Kernel(name=name, kind=kind, precision="+".join(sorted(precisions.get(name, ()))) or UNKNOWN)
        for name, kind in layers.items()
    )


# TensorRT's names of element types: (NumPy-style name, bits).
_TYPES = {
    "Int4": ("int4", 4),
    "Int8": ("int8", 8),
    "UInt8": ("uint8", 8),
    "Bool": ("bool", 8),
    "FP8": ("float8", 8),
    "Half": ("float16", 16),
    "BFloat16": ("bfloat16", 16),
    "Float": ("float32", 32),
    "Int32": ("int32", 32),
    "Int64": ("int64", 64),
}
_FLOATS = ("float16", "bfloat16", "float32")
_TENSOR = re.compile(r"\{ Name: ([^,]+), Dimensions: \[([-\d,]*)\][^}]*?Datatype: (\w+)")
_MATRIX_LAYER = re.compile(r"LayerType: \w*(correlation|conv|gemm|matmul|matrixmultiply|runtime_fusion)", re.IGNORECASE)


def read_layer_list(text: str, layers: Mapping[str, LayerKind]) -> Audit:
    """Read the layer list that TensorRT's verbose logger (or engine inspector) prints with detailed profiling.

    Each line describes one kernel: its inputs, constants, outputs and the ONNX layers it came from. Several ONNX layers
    may share a kernel (q, k and v), and each of them counts. The format is not an API: what cannot be read becomes
    "unknown", not an error.

    Args:
        text: The whole verbose build log.
        layers: Kind of each weight layer, by node name.
    """
    lines = [line for line in text.partition("Layers:\n")[2].splitlines() if line.startswith("Name: ")]
    precisions: dict[str, set[str]] = {}
    for line in lines:
        if not _MATRIX_LAYER.search(line):  # reformatting, element-wise and unpacking kernels multiply no weights
            continue
        precision = _precision(_TENSOR.findall(line.partition("Outputs: ")[0]))
        for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", line):
            precisions.setdefault(name, set()).add(precision)
    kernels = name_kernels(layers, precisions)
    missing = sum(kernel.precision == UNKNOWN for kernel in kernels)
    weight_bytes, note = _weight_bytes(text, lines)
    if missing:
        note = f"{missing} of {len(kernels)} weight layers are not in the layer list. {note}"
    return Audit(kernels=kernels, weight_bytes=weight_bytes, note=note)


def _precision(operands: list[tuple[str, str, str]]) -> str:
    """Return the dtype that a kernel multiplies in: that of its activation and of its weights, or "axb" if they differ.

    Args:
        operands: (name, dimensions, dtype) of its inputs and constants, as TensorRT prints them.
    """
    if len(operands) < 2:
        return UNKNOWN
    # The first operand is the activation. Bias, scales and residual are operands too; the weights are the largest one
    # without a batch dimension, which TensorRT prints as -1.
    weights = max(operands[1:], key=lambda operand: 0 if "-1" in operand[1] else _elements(operand[1]))
    dtypes = {_TYPES.get(dtype, (UNKNOWN, 0))[0] for dtype in (operands[0][2], weights[2])}
    return "x".join(sorted(dtypes))


def _elements(dims: str) -> int:
    return prod(int(size) for size in dims.split(",") if size)


def _weight_bytes(text: str, lines: list[str]) -> tuple[dict[str, int], str]:
    """Split the reported total by element type: integers as listed, floats as the rest."""
    reported = re.search(r"Total Weights Memory: (\d+)", text)
    if not reported:
        return {}, "The builder reported no weight memory."
    total = int(reported[1])
    constants: dict[str, tuple[str, int]] = {}
    for line in lines:
        for name, dims, printed in _TENSOR.findall(line.partition("Constants: ")[2].partition("Outputs: ")[0]):
            if printed not in _TYPES:
                return {"total": total}, f"The layer list has constants of unknown type {printed}."
            dtype, bits = _TYPES[printed]
            constants[name] = (dtype, (_elements(dims) * bits + 7) // 8)
    held: Counter[str] = Counter()
    for dtype, size in constants.values():
        held[dtype] += size
    codes = {dtype: size for dtype, size in held.items() if dtype not in _FLOATS}
    floats = "+".join(sorted(held.keys() - codes.keys()))
    rest = total - sum(codes.values())
    if not floats or rest < 0:
        return {"total": total}, "The layer list does not split the weights by type."
    # Floats are what is left of the total, not what the list adds up to: it names equal constants (a bias, a scale)
    # once per use although they are stored once. Integer weights are used once each.
    return {**codes, floats: rest}, "Total as the builder reports it, integers by the layer list, floats the rest."
