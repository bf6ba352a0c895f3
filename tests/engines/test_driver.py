"""The driver's answers are read right, on a stand-in for its library."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from engines import EngineError, driver

LOST = 999


class _Library:
    """A driver of one GPU of generation 8.9; `failing` names the call that fails."""

    def __init__(self, failing: str = "", count: int = 1) -> None:
        self.failing = failing
        self.calls: list[str] = []
        self._numbers = {"cuDeviceGetCount": count, "cuDriverGetVersion": 12040, "cuDeviceTotalMem_v2": 24 << 30}

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.calls.append(name)
            if name == "cuDeviceGetName":
                args[0].value = b"A GPU"
            elif name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 8, 76: 9}[args[1]]
            elif name in self._numbers:
                args[0]._obj.value = self._numbers[name]
            return LOST if name == self.failing else 0

        return call


def _install(monkeypatch: pytest.MonkeyPatch, library: _Library) -> _Library:
    monkeypatch.setattr(driver, "_load", lambda: library)
    return library


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Library())
    assert driver.no_gpu() is None
    assert driver.gpus() == (driver.Gpu(name="A GPU", capability="8.9", memory_bytes=24 << 30, cuda="12.4"),)


def test_without_a_gpu_or_a_driver_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Library(count=0))
    assert driver.no_gpu() == "no NVIDIA GPU here (the driver answered 0 and lists 0 devices)"
    _install(monkeypatch, _Library(failing="cuInit"))
    assert driver.no_gpu() == f"no NVIDIA GPU here (the driver answered {LOST} and lists 0 devices)"

    def absent() -> ctypes.CDLL:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_load", absent)
    assert "no NVIDIA driver here" in str(driver.no_gpu())
    assert driver.gpus() == ()


def test_a_gpu_of_a_number_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Library(count=2))
    assert driver.no_gpu(1) is None
    for number in (2, -1):
        assert driver.no_gpu(number) == f"there is no GPU {number}: this machine has 2, numbered from 0"


def test_work_is_captured_once_and_replayed_and_everything_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, _Library())
    done: list[str] = []
    with driver.captured(7, lambda: done.append("work")) as replay:
        replay()
        replay()
    assert done == ["work"]
    assert library.calls == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
        "cuGraphDestroy",
    ]


def test_a_capture_ends_even_if_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, _Library())

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), driver.captured(7, fail):
        pass
    assert library.calls == ["cuStreamBeginCapture_v2", "cuStreamEndCapture"]


def test_an_error_of_the_driver_names_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Library(failing="cuGraphInstantiateWithFlags"))
    with (
        pytest.raises(EngineError, match=rf"could not make a graph \(CUDA error {LOST}\)"),
        driver.captured(7, lambda: None),
    ):
        pass
