"""The form of Q/DQ that each target takes; one plan serves them all.

In: a profile's name. Out: its choices, which `graph.qdq` and `graph.openvino` follow. TensorRT and ONNX Runtime need
opposite graphs: TensorRT takes only signed activations with zero point 0 and is slowed by Q/DQ after a convolution;
ONNX Runtime's CPU kernels need unsigned activations, and make a convolution integer only if its output is quantized
too. TensorRT refuses packed INT4 weights beside INT8 activations, except in the form
INT4 -> DequantizeLinear(1) -> Cast(INT8) -> DequantizeLinear(per channel), which OpenVINO runs as well. OpenVINO's
graphs differ from TensorRT's only in that they may hold unsigned codes.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from gaq_export.errors import GaqError


class WeightForm(StrEnum):
    """How the codes of a weight are stored in the graph.

    INT8: one code a byte, whatever its bits; every runtime takes it.
    INT4: two codes a byte, dequantized directly.
    INT4_CAST: two codes a byte, unpacked to INT8 first, so that the layer may multiply in INT8.
    FLOAT8: E4M3 numbers.
    """

    INT8 = "int8"
    INT4 = "int4"
    INT4_CAST = "int4-cast"
    FLOAT8 = "float8"


@dataclass(frozen=True, kw_only=True)
class QdqProfile:
    """What one target takes.

    Attributes:
        unsigned: activations as UINT8 with zero point 128 (a lossless re-encoding of symmetric INT8).
        factors_after: a factor and a shift that put an activation onto its grid are undone after the layer, so that
            the layer sees a symmetric grid and computes in integers; otherwise they are undone before it.
        zero_points: takes a zero point other than the middle, where it is the same at every step.
        quantize_outputs: Q/DQ after convolutions and fully connected layers too.
        unsigned_products: takes unsigned codes with zero point 0, as the probabilities inside attention have;
            otherwise the products inside attention stay float.
        openvino_forms: GroupNorm, SiLU and the way to tokens as `gaq_export.graph.openvino` writes them.
        int4: form of weights of 4 bits and fewer.
        float8: E4M3 numbers in place of integers, for weights and activations both.
    """

    unsigned: bool
    factors_after: bool
    zero_points: bool
    quantize_outputs: bool
    unsigned_products: bool
    openvino_forms: bool
    int4: WeightForm
    float8: bool

    def weight_form(self, bits: int) -> WeightForm:
        """Return the form of a weight of `bits` bits."""
        if self.float8:
            return WeightForm.FLOAT8
        return self.int4 if bits <= 4 else WeightForm.INT8


# As calibrated, for checkers and parity: nothing is moved for the sake of a runtime.
_REFERENCE = QdqProfile(
    unsigned=False,
    factors_after=True,
    zero_points=False,
    quantize_outputs=False,
    unsigned_products=True,
    openvino_forms=False,
    int4=WeightForm.INT4,
    float8=False,
)
# TensorRT's parser refuses every zero point but 0, and so the unsigned probabilities inside attention.
_TENSORRT = replace(_REFERENCE, unsigned_products=False, int4=WeightForm.INT4_CAST)

PROFILES: dict[str, QdqProfile] = {
    "reference": _REFERENCE,
    "trt": _TENSORRT,
    "openvino": replace(_REFERENCE, zero_points=True, openvino_forms=True, int4=WeightForm.INT4_CAST),
    # INT4 weights never reach ONNX Runtime's integer kernels, so they are stored as INT8 here.
    "ort-cpu": replace(
        _REFERENCE,
        unsigned=True,
        factors_after=False,
        zero_points=True,
        quantize_outputs=True,
        int4=WeightForm.INT8,
    ),
    "ort-cuda": replace(_REFERENCE, zero_points=True, int4=WeightForm.INT8),
    "trt-fp8": replace(_TENSORRT, float8=True),
}


def find_profile(name: str) -> QdqProfile:
    """Return the profile called `name`.

    Raises:
        GaqError: there is none of that name; the message lists those there are.
    """
    if name not in PROFILES:
        raise GaqError(f"Unknown profile {name!r}. Choose one of {list(PROFILES)}.")
    return PROFILES[name]
