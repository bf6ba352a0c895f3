"""Where PyTorch computes: what a user writes as --device, and what this machine has.

In: "auto", "cpu", "cuda", "cuda:1" or "mps". Out: a `Device`. A backend decides whether its engines run on a GPU; on
which, `gpu_number` says by the same name.
"""

import os
import re
from dataclasses import dataclass

import torch

from calib.choices import Cache
from calib.devices import HOST
from engines.driver import no_gpu
from gaq_export.errors import GaqError

_PATTERN = re.compile(r"auto|cpu|mps|cuda(?::[0-9]{1,3})?")
# cuBLAS computes the same bits at every call only with a workspace of a fixed size, set before it is first used.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a float or a fake-quantized network computes.

    Attributes:
        place: the device, as PyTorch has it.
        tf32: whether a CUDA GPU may round products of float32 to TensorFloat-32, which is faster and less exact.
        cache: where a calibration puts its recordings; no bit depends on it.
    """

    place: torch.device = HOST
    tf32: bool = False
    cache: Cache = Cache.AUTO

    @property
    def kind(self) -> str:
        """What bits depend on, for records: "cpu", "cuda", "cuda with TF32"; which of several GPUs it is, is not."""
        return f"{self.place.type} with TF32" if self.tf32 and self.place.type == "cuda" else self.place.type


ON_HOST = Device()


def find_device(name: str | torch.device = "auto", *, tf32: bool = False, cache: Cache = Cache.AUTO) -> Device:
    """Return the device that a user named.

    Args:
        name: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:N" or "mps"; or PyTorch's own.
        tf32: see `Device`.
        cache: see `Device`.

    Raises:
        GaqError: the name is none of these, or there is no such device here.
    """
    if isinstance(name, torch.device):
        return Device(place=name, tf32=tf32, cache=cache)
    if not _PATTERN.fullmatch(name):
        raise GaqError(f"Found the device {name!r}; give auto, cpu, cuda, cuda:N (N counts GPUs from 0) or mps.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(name)
    if place.type == "cuda":
        _require_cuda(name, place)
        os.environ.setdefault(*_WORKSPACE)
        place = torch.device("cuda", place.index or 0)  # tensors say "cuda:0", and devices are compared
    if place.type == "mps":
        if not torch.backends.mps.is_available():
            raise GaqError("Found --device mps, but there is no GPU of Apple's here; use --device cpu.")
        place = torch.device("mps", 0)
    return Device(place=place, tf32=tf32, cache=cache)


def describe_torch() -> str:
    """Return the version of PyTorch and what --device auto takes, with the reason where that is not a CUDA GPU."""
    if torch.cuda.is_available():
        return f"{torch.__version__}, computes on cuda ({torch.cuda.get_device_name(0)})"
    return f"{torch.__version__}, computes on cpu: {_why_no_cuda()}"


def gpu_number(name: str) -> int:
    """Return on which GPU engines of GPUs are to run, by the name of a device: 1 for "cuda:1", 0 if no number is in it.

    PyTorch is not asked: engines run where it is a build without CUDA.

    Raises:
        GaqError: the name is no device's, or there is no such GPU here.
    """
    if not _PATTERN.fullmatch(name):
        raise GaqError(f"Found the device {name!r}; give auto, cpu, cuda, cuda:N (N counts GPUs from 0) or mps.")
    if not name.startswith("cuda"):
        return 0
    number = int(name.partition(":")[2] or 0)
    if reason := no_gpu(number):
        raise GaqError(f"Found --device {name}, but {reason}; see `gaq-export doctor`.")
    return number


def _require_cuda(name: str, place: torch.device) -> None:
    if not torch.cuda.is_available():
        raise GaqError(f"Found --device {name}, but {_why_no_cuda()}; see `gaq-export doctor`, or use --device cpu.")
    count = torch.cuda.device_count()
    if (place.index or 0) >= count:
        raise GaqError(f"Found --device {name}, but this machine has {count} GPUs, numbered from 0.")


def _why_no_cuda() -> str:
    # PyTorch may lack CUDA though there is a GPU.
    if reason := no_gpu():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} is for CUDA {torch.version.cuda}, which the driver here does not run"
