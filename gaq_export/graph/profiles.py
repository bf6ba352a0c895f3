"""How each target wants its quantized graph; one plan serves them all.

TensorRT and ONNX Runtime want opposite graphs: TensorRT takes only signed activations with zero point 0 and is slowed
by Q/DQ behind a convolution; ONNX Runtime's CPU kernels want unsigned activations and make a convolution integer only
if its output is quantized too. TensorRT refuses packed INT4 weights beside INT8 activations, except in the form
INT4 -> DequantizeLinear(1) -> Cast(INT8) -> DequantizeLinear(per channel), which OpenVINO runs as well. OpenVINO's
graphs differ from TensorRT's only in that they may hold unsigned codes.
"""

from dataclasses import dataclass, replace

from gaq_export.errors import GaqError


@dataclass(frozen=True, kw_only=True)
class QdqProfile:
    """One target's wishes.

    Attributes:
        unsigned: activations as UINT8 with zero point 128 (a lossless re-encoding of symmetric INT8).
        factors_behind: what moves and stretches an activation onto its grid is undone behind the layer, so that the
            layer sees a symmetric grid; or else before it.
        zero_points: takes a zero point other than the middle, where it is the same at every step.
        quantize_outputs: Q/DQ behind convolutions and fully connected layers too.
        unsigned_products: takes unsigned codes with zero point 0, as the probabilities inside attention have; or else
            the products inside attention stay float.
        openvino_forms: GroupNorm, SiLU and the passage to tokens as `gaq_export.graph.openvino` writes them.
        int4: form of weights of 4 bits and fewer: "cast" or "direct" (both packed two a byte), or "expand" (INT8).
        float8: E4M3 numbers in place of integers, weights and activations both.
    """

    unsigned: bool
    factors_behind: bool
    zero_points: bool
    quantize_outputs: bool
    unsigned_products: bool
    openvino_forms: bool
    int4: str
    float8: bool


_REFERENCE = QdqProfile(
    unsigned=False,
    factors_behind=True,
    zero_points=False,
    quantize_outputs=False,
    unsigned_products=True,
    openvino_forms=False,
    int4="direct",
    float8=False,
)
_TENSORRT = replace(_REFERENCE, unsigned_products=False, int4="cast")

PROFILES: dict[str, QdqProfile] = {
    "reference": _REFERENCE,
    "trt": _TENSORRT,
    "openvino": replace(_REFERENCE, zero_points=True, openvino_forms=True, int4="cast"),
    "ort-cpu": replace(
        _REFERENCE, unsigned=True, factors_behind=False, zero_points=True, quantize_outputs=True, int4="expand"
    ),
    "ort-cuda": replace(_REFERENCE, zero_points=True, int4="expand"),
    "trt-fp8": replace(_TENSORRT, float8=True),
}


def find_profile(name: str) -> QdqProfile:
    """Return the profile called `name`; raise GaqError listing those there are."""
    if name not in PROFILES:
        raise GaqError(f"Unknown profile {name!r}. Choose one of {list(PROFILES)}.")
    return PROFILES[name]
