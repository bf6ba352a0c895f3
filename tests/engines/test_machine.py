"""What a machine is said to have."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

from engines.driver import gpus, no_gpu
from engines.machine import CPU_FEATURES, PACKAGES, inspect_machine


def test_packages_have_the_versions_that_are_installed() -> None:
    found = inspect_machine().packages
    assert set(found) == set(PACKAGES)
    assert found["onnx"] == version("onnx")
    assert (found["pycuda"] is None) == (importlib.util.find_spec("pycuda") is None)


def test_features_are_those_that_the_kernel_lists() -> None:
    info, found = Path("/proc/cpuinfo"), inspect_machine()
    if not info.exists():
        assert found.features is None
        return
    words = set(info.read_text().split())
    assert found.features is not None
    assert set(found.features) == words & CPU_FEATURES.keys()
    assert found.processor in info.read_text()


def test_there_are_gpus_where_the_driver_lists_some() -> None:
    assert bool(gpus()) == (no_gpu() is None)
    assert inspect_machine().gpus == gpus()
