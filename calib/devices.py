"""Where tensors live: the device of a network, and the ways between it and the host.

Samples, random draws and whatever a plan holds stay on the host, the same on every machine. A network, what it computes
and what is learned with it live on the network's device; whoever makes a tensor for a network makes it there.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calib.shared_copy import copy_sharing_tensors

HOST = torch.device("cpu")


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's tensors; the host if it has none."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return HOST if tensor is None else tensor.device


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module on a device: itself if it is there, else a copy; the module stays as and where it is.

    Plain attributes that are tensors move as well, which `nn.Module.to` leaves behind.
    """
    if device_of(module) == device:
        return module
    moved = copy_sharing_tensors(module).to(device)
    for part in moved.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, value.to(device))
    return moved


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock shows the time that this took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_bytes(device: torch.device) -> float:
    """Return the bytes of memory that are free on a GPU; infinite where nothing tells."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch has reserved and does not use is free for us, though not for the driver.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def reproducible(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Compute the same bits on the same GPU while this is open; nothing has to change for that on the host.

    Args:
        device: where the work runs.
        tf32: whether products of float32 may be rounded to 10 bits of mantissa (TensorFloat-32), which is faster.
    """
    if device.type != "cuda":
        yield
        return
    backends = torch.backends
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        backends.cudnn.benchmark,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
    )
    # cuDNN would choose its kernels by timing them, and round products to TF32, unless told not to. A few operations
    # have no deterministic form; they only warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    backends.cudnn.benchmark = False
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before[2:]
