"""Every backend has its profile, and a profile says how a weight is stored."""

import pytest

from engines import BACKENDS
from gaq_export.errors import GaqError
from gaq_export.graph.profiles import PROFILES, WeightForm, find_profile


def test_every_backend_names_a_profile_that_exists() -> None:
    assert {backend.profile for backend in BACKENDS.values()} <= PROFILES.keys()
    assert all(find_profile(name) is profile for name, profile in PROFILES.items())


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(GaqError, match=r"Unknown profile 'tensorrt'. Choose one of \['reference', 'trt', 'openvino', "):
        find_profile("tensorrt")


@pytest.mark.parametrize(
    ("profile", "bits", "form"),
    [
        ("reference", 4, WeightForm.INT4),
        ("reference", 5, WeightForm.INT8),
        ("trt", 3, WeightForm.INT4_CAST),
        ("openvino", 4, WeightForm.INT4_CAST),
        ("openvino", 8, WeightForm.INT8),
        ("ort-cpu", 4, WeightForm.INT8),
        ("trt-fp8", 4, WeightForm.FLOAT8),
        ("trt-fp8", 8, WeightForm.FLOAT8),
    ],
)
def test_only_weights_of_four_bits_and_fewer_are_packed(profile: str, bits: int, form: WeightForm) -> None:
    assert find_profile(profile).weight_form(bits) is form


def test_tensorrt_takes_symmetric_grids_alone() -> None:
    for name in ("trt", "trt-fp8"):
        profile = find_profile(name)
        refused = (profile.unsigned, profile.zero_points, profile.unsigned_products, profile.quantize_outputs)
        assert not any(refused)
