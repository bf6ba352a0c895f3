"""Where PyTorch and where engines run, by the names that a user writes."""

import pytest

from gaq_export import devices
from gaq_export.devices import gpu_number
from gaq_export.errors import GaqError


def test_an_engine_of_gpus_runs_on_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "no_gpu", lambda number: None if number < 2 else f"there is no GPU {number}")
    numbers = {name: gpu_number(name) for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:1")}
    assert numbers == {"auto": 0, "cpu": 0, "mps": 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1}
    with pytest.raises(GaqError, match=r"^Found --device cuda:2, but there is no GPU 2; see `gaq-export doctor`\.$"):
        gpu_number("cuda:2")
    with pytest.raises(GaqError, match=r"^Found the device 'gpu1'; give auto, cpu, cuda, cuda:N"):
        gpu_number("gpu1")
