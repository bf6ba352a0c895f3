"""Standard TensorRT builds only where it can time its kernels."""

import importlib.util

import pytest

from engines import trt
from engines.driver import no_gpu


def test_it_needs_its_package_and_then_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for problem in (trt.cannot_build(), trt.cannot_run()):
        assert problem == "tensorrt is not installed: pip install tensorrt"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert trt.cannot_build() == no_gpu()
