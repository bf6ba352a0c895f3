"""What a machine is said to have."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from engines import machine
from engines.driver import gpus, no_gpu
from engines.machine import CPU_FEATURES, PACKAGES, inspect_machine, other_processor


def test_packages_have_the_versions_that_are_installed() -> None:
    packages = inspect_machine().packages
    assert set(packages) == set(PACKAGES)
    assert packages["onnx"] == version("onnx")
    assert (packages["pycuda"] is None) == (importlib.util.find_spec("pycuda") is None)


def test_features_are_those_that_the_kernel_lists() -> None:
    info, machine = Path("/proc/cpuinfo"), inspect_machine()
    if not info.exists():
        assert machine.features is None
        return
    words = set(info.read_text().split())
    assert machine.features is not None
    assert set(machine.features) == words & CPU_FEATURES.keys()
    assert machine.processor in info.read_text()


def test_there_are_gpus_where_the_driver_lists_some() -> None:
    assert bool(gpus()) == (no_gpu() is None)
    assert inspect_machine().gpus == gpus()


@pytest.mark.parametrize(
    ("built_on", "here", "difference"),
    [
        (("avx2", "avx512_vnni"), ("avx512_vnni", "avx2"), None),
        (None, ("avx2",), None),
        (("avx2",), None, None),
        (("avx2", "avx_vnni"), ("avx2", "avx_vnni", "amx_bf16"), "has amx_bf16 besides"),
        (("avx2", "avx_vnni", "amx_int8"), ("avx2", "avx_vnni"), "lacks amx_int8"),
        (("avx2", "avx_vnni"), ("avx2",), "lacks avx_vnni; sums of products of 8-bit weights may overflow here"),
        (("avx2", "avx_vnni"), ("asimddp",), "lacks avx2, avx_vnni and has asimddp besides"),
    ],
)
def test_another_processor_is_told_by_its_features(built_on, here, difference, monkeypatch) -> None:
    monkeypatch.setattr(machine, "cpu_features", lambda: here)
    assert other_processor(built_on) == difference
