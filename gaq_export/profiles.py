"""How each target wants its quantized graph; one plan serves them all.

TensorRT and ONNX Runtime want opposite graphs: TensorRT takes only signed activations with zero point 0 and is slowed
by Q/DQ behind a convolution; ONNX Runtime's CPU kernels want unsigned activations and make a convolution integer only
if its output is quantized too. TensorRT refuses packed INT4 weights beside INT8 activations, except in the form
INT4 -> DequantizeLinear(1) -> Cast(INT8) -> DequantizeLinear(per channel), which OpenVINO runs as well. OpenVINO's
graphs differ from TensorRT's only in that they may hold unsigned codes.
"""

from dataclasses import dataclass

from gaq_export.errors import GaqError


@dataclass(frozen=True, kw_only=True)
class QdqProfile:
    """One target's wishes.

    Attributes:
        unsigned: activations as UINT8 with zero point 128 (a lossless re-encoding of symmetric INT8).
        quantize_outputs: Q/DQ behind convolutions and fully connected layers too.
        unsigned_products: takes unsigned codes with zero point 0, as the probabilities inside attention have.
        int4: form of weights of 4 bits and fewer: "cast" or "direct" (both packed two a byte), or "expand" (INT8).
    """

    unsigned: bool
    quantize_outputs: bool
    unsigned_products: bool
    int4: str


PROFILES: dict[str, QdqProfile] = {
    "reference": QdqProfile(unsigned=False, quantize_outputs=False, unsigned_products=True, int4="direct"),
    "trt": QdqProfile(unsigned=False, quantize_outputs=False, unsigned_products=False, int4="cast"),
    "openvino": QdqProfile(unsigned=False, quantize_outputs=False, unsigned_products=True, int4="cast"),
    "ort-cpu": QdqProfile(unsigned=True, quantize_outputs=True, unsigned_products=True, int4="expand"),
}


def find_profile(name: str) -> QdqProfile:
    """Return the profile called `name`; raise GaqError listing those there are."""
    if name not in PROFILES:
        raise GaqError(f"Unknown profile {name!r}. Choose one of {list(PROFILES)}.")
    return PROFILES[name]
