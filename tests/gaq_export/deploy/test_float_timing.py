"""An engine is timed beside a float one of its backend, and it is said in words which is faster."""

import pytest

from engines import BACKENDS
from gaq_export.deploy.float_timing import FloatTiming, against_float, float_compute


@pytest.mark.parametrize(
    ("seconds", "float_seconds", "words"),
    [
        (1.0, 1.9, "1.90 x as fast as float"),
        (1.2, 1.0, "float is 1.20 x as fast here"),
        (1.0, 1.01, "as fast as float here"),
        (1.04, 1.0, "as fast as float here"),
    ],
)
def test_it_is_said_which_is_faster(seconds: float, float_seconds: float, words: str) -> None:
    assert against_float(seconds, float_seconds) == words
    timing = FloatTiming(
        batch=4, name="tensorrt, W4A8", seconds=seconds, float_name="tensorrt, float16", float_seconds=float_seconds
    )
    assert timing.line.endswith(f" by tensorrt, float16: {words}")


def test_a_fair_float_engine_is_of_fp16_on_a_gpu() -> None:
    assert float_compute(BACKENDS["tensorrt"], "float32") == "float16"
    assert float_compute(BACKENDS["openvino"], None) == "float32"
    assert float_compute(BACKENDS["openvino"], "bfloat16") == "bfloat16"
