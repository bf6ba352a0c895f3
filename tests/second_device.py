"""A second device on a machine that has only a CPU, so that tests see where every tensor lives.

A `DeviceTensor` says that it is on DEVICE, computes on the CPU, and raises where an operation mixes it with a tensor of
the host, as a GPU would. DEVICE is one of PyTorch's kinds that no build computes on but every build can name; autograd
works on it without a driver. Tensors move by `.to`, as ever, while `second_device` is open.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
_HOST = torch.device("cpu")
_aten = torch.ops.aten
# They take a tensor of either device, as on a GPU: copies, and an index that lies on the host.
_COPIES = frozenset({_aten._to_copy.default, _aten.copy_.default})
_INDEXED = frozenset({_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default})


class DeviceTensor(Tensor):
    """A tensor on DEVICE; `inner` is where it really is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        """Wrap a tensor of the host."""
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the host what was asked of the device."""
        return _compute(func, args, kwargs or {})

    def __repr__(self, **how: Any) -> str:
        """Show the values and the device."""
        return f"DeviceTensor({self.inner!r})"


class _Mode(TorchDispatchMode):
    """Sees what makes tensors out of nothing, and moves of tensors that are still on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    asked = kwargs.get("device")
    if func in _COPIES:
        on_device = isinstance(args[0], DeviceTensor) if asked is None else torch.device(asked) == DEVICE
    else:
        _require_one_device(func, args, tensors)
        on_device = any(isinstance(v, DeviceTensor) for v in tensors)
        on_device = on_device if asked is None else torch.device(asked) == DEVICE
    inner_args, inner_kwargs = pytree.tree_map(_inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and func._schema.returns and func._schema.returns[0].alias_info is not None:
        return kwargs["out"] if "out" in kwargs else args[0]  # in place: the same object, not a new wrapper
    return pytree.tree_map(_wrapped, out) if on_device else out


def _require_one_device(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise as a GPU does where devices are mixed; a number, (), may come from the host."""
    device = [v for v in tensors if isinstance(v, DeviceTensor)]
    host = [v for v in tensors if not isinstance(v, DeviceTensor) and v.ndim > 0]
    if device and host and not (func in _INDEXED and isinstance(args[0], DeviceTensor)):
        shapes = [tuple(v.shape) for v in host]
        raise RuntimeError(f"{func}: expected all tensors on one device, found {shapes} on the host and others not")


def _inner(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    return _HOST if isinstance(value, torch.device) else value


def _wrapped(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Make DEVICE usable while this is open."""
    with _Mode():
        yield DEVICE
