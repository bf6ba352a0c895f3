"""What runs on which GPU is known from its compute capability, before anything is installed or built."""

import pytest

from engines import BACKENDS
from engines.driver import Gpu
from engines.generations import GENERATIONS, cannot_run

RTX_NOT = "tensorrt-rtx does not run on the NVIDIA X (compute capability {}): use tensorrt"


@pytest.mark.parametrize(
    ("capability", "tensorrt", "rtx"),
    [(one, True, True) for one in ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1", "13.0")]
    + [(one, True, False) for one in ("9.0", "10.0", "10.3")]
    + [(one, False, False) for one in ("6.1", "7.0")],
)
def test_a_backend_runs_where_the_table_says(capability: str, tensorrt: bool, rtx: bool) -> None:
    assert (cannot_run("NVIDIA X", capability, "tensorrt") is None) == tensorrt
    assert (cannot_run("NVIDIA X", capability, "tensorrt-rtx") is None) == rtx


@pytest.mark.parametrize(
    ("capability", "advice"),
    [
        ("8.9", None),
        ("12.0", None),
        ("9.0", RTX_NOT.format("9.0")),
        (
            "10.0",
            f"{RTX_NOT.format('10.0')}. INT8 is not the fast path of the NVIDIA X: FP8 is, with build-engine --backend "
            "tensorrt --numbers fp8",
        ),
        ("7.5", "TensorRT-RTX computes convolutions of INT8 in FP16 on the NVIDIA X, and needs build-engine --target "
         "sm75"),
        ("6.1", "tensorrt does not run on the NVIDIA X (compute capability 6.1): use onnxruntime-cuda"),
    ],
)  # fmt: skip
def test_the_advice_is_one_line(capability: str, advice: str | None) -> None:
    assert Gpu(name="NVIDIA X", capability=capability, memory_bytes=1, cuda="13.0").advice == advice


def test_the_table_names_backends_that_exist_and_no_capability_twice() -> None:
    assert {backend for one in GENERATIONS for backend in one.backends} <= BACKENDS.keys()
    capabilities = [capability for one in GENERATIONS for capability in one.capabilities]
    assert len(capabilities) == len(set(capabilities))
