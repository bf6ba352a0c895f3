"""Where PyTorch and where engines run, by the names that a user writes."""

import pytest
import torch

from gaq_export import devices
from gaq_export.devices import ON_HOST, describe_torch, find_device, gpu_number
from gaq_export.errors import GaqError


def test_an_engine_of_gpus_runs_on_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "no_gpu", lambda number: None if number < 2 else f"there is no GPU {number}")
    numbers = {name: gpu_number(name) for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:1")}
    assert numbers == {"auto": 0, "cpu": 0, "mps": 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1}
    with pytest.raises(GaqError, match=r"^Found --device cuda:2, but there is no GPU 2; see `gaq-export doctor`\.$"):
        gpu_number("cuda:2")
    with pytest.raises(GaqError, match=r"^Found the device 'gpu1'; give auto, cpu, cuda, cuda:N"):
        gpu_number("gpu1")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "no_gpu", lambda: "no NVIDIA driver")
    assert find_device("auto") == find_device("cpu") == ON_HOST
    assert describe_torch() == f"{torch.__version__}, computes on cpu: no NVIDIA driver"
    with pytest.raises(
        GaqError, match=r"^Found --device cuda:1, but no NVIDIA driver; see `gaq-export doctor`, or use"
    ):
        find_device("cuda:1")
    monkeypatch.setattr(devices, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert describe_torch().endswith(f"computes on cpu: torch {torch.__version__} is a build without CUDA")
