"""Cut a network into blocks in network order, and record what goes in and out of one.

A block is what AdaRound reconstructs at once: the outermost module that is called once a forward pass with plain
tensors, returns one tensor and holds at most MAX_LAYERS quantized layers. In a diffusers U-Net that gives residual
blocks, attention blocks and single convolutions, as in the papers; in a foreign network whatever has that shape.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib.data import CalibrationSet
from calib.layers import Trace

MAX_LAYERS = 6
MEMORY_BYTES = 1 << 30  # a recording larger than this is kept in a memory-mapped file


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module to reconstruct and the quantized layers in it, both by full name, in call order.

    `module` is set where the network has no such module: it is called with `t` alone (`calib.temporal`).
    """

    name: str
    layers: tuple[str, ...]
    module: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class BlockIO:
    """Inputs of one block and its float target, N samples.

    `inputs` are the leaves of (args, kwargs): tensors of N samples, or values shared by all of them.
    """

    inputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def take(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Return args, kwargs and target of the samples at `index` (M,)."""
        leaves = [v[index] if self._per_sample(v) else v for v in self.inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs, self.target[index]

    def _per_sample(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)


def find_blocks(found: Trace, quantized: Iterable[str]) -> tuple[list[Block], list[str]]:
    """Return the blocks in network order, and the quantized layers that no block covers (called more than once)."""
    wanted = set(quantized)
    order = [layer.name for layer in found.layers if layer.name in wanted]
    blocks: dict[str, list[str]] = {}
    loose = []
    for layer in order:
        owner = next((name for name in _outermost_first(layer) if _is_block(found, name, order)), None)
        if owner is None:
            loose.append(layer)
        else:
            blocks.setdefault(owner, []).append(layer)
    return [Block(name=name, layers=tuple(layers)) for name, layers in blocks.items()], loose


def _outermost_first(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_block(found: Trace, name: str, order: list[str]) -> bool:
    call = found.calls.get(name)
    inside = sum(layer == name or layer.startswith(name + ".") for layer in order)
    return call is not None and call.plain and call.count == 1 and inside <= MAX_LAYERS


class _Reached(Exception):
    """Raised by a hook to leave a forward pass that has shown what was wanted."""


def record_inputs(
    model: nn.Module, name: str, data: CalibrationSet, micro_batch: int, scratch: Path | None = None
) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
    """Run `model` on `data` up to module `name` and return the leaves of its (args, kwargs), and their tree."""
    seen: list[tuple[list[Any], pytree.TreeSpec]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(pytree.tree_flatten((args, kwargs)))
        raise _Reached

    store: list[Any] = []
    with model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True):
        for start, rows, kept in _micro_batches(model, data, micro_batch):
            leaves, spec = seen.pop()
            if not store:
                store = [_room(v, rows, len(data), scratch, f"{i}") for i, v in enumerate(leaves)]
            for kept_leaf, leaf in zip(store, leaves, strict=True):
                if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows:
                    kept_leaf[start : start + kept] = leaf[:kept]
    return tuple(store), spec


def record_output(
    model: nn.Module, name: str, data: CalibrationSet, micro_batch: int, scratch: Path | None = None
) -> Tensor:
    """Run `model` on `data` through module `name` and return its output (N, ...)."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        seen.append(out)
        raise _Reached

    store: Tensor | None = None
    with model.get_submodule(name).register_forward_hook(hook):
        for start, rows, kept in _micro_batches(model, data, micro_batch):
            out = seen.pop()
            if store is None:
                store = _room(out, rows, len(data), scratch, "target")
            store[start : start + kept] = out[:kept]
    assert store is not None
    return store


def _micro_batches(model: nn.Module, data: CalibrationSet, size: int) -> Iterable[tuple[int, int, int]]:
    """Run `model` on fixed-size batches, the last one padded, and yield (start, rows, rows that count)."""
    with torch.no_grad():
        for start in range(0, len(data), size):
            index = torch.arange(start, start + size).clamp(max=len(data) - 1)
            try:
                model(data.x[index], data.t[index])
            except _Reached:
                yield start, size, min(size, len(data) - start)


def _room(value: object, rows: int, total: int, scratch: Path | None, name: str) -> Any:
    """Return storage for `total` samples of what `value` holds `rows` of; a shared value is returned as it is."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
        return value
    shape = (total, *value.shape[1:])
    if scratch is None or math.prod(shape) * value.element_size() <= MEMORY_BYTES:
        return torch.empty(shape, dtype=value.dtype)
    scratch.mkdir(parents=True, exist_ok=True)
    file = str(scratch / name)
    return torch.from_file(file, shared=True, size=math.prod(shape), dtype=value.dtype).reshape(shape)
