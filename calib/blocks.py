"""Cut a network into blocks in network order; what goes in and out of one.

A block is what AdaRound reconstructs at once: the outermost module that is called once a forward pass with plain
tensors, returns one tensor and holds at most MAX_LAYERS quantized layers, or IN_TRANSFORMER if an attention is its
direct child, since such a module is a transformer's block (four layers of an attention to itself, as many of one to a
text, two of its perceptron, one of its norm). In a diffusers network that gives residual, transformer and attention
blocks and single layers, as in the papers; in a foreign network whatever has that shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib.devices import HOST
from calib.sample_store import Samples, rows_at
from calib.trace import Trace

MAX_LAYERS, IN_TRANSFORMER = 6, 11


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module to reconstruct and the quantized layers in it, both by full name, in call order.

    `module` is set where the network has no such module: it is called with `t` alone (`calib.temporal`).
    """

    name: str
    layers: tuple[str, ...]
    module: nn.Module | None = None

    def key(self, layer: str) -> str:
        """Return the name of a layer's weight inside the block's module."""
        whole = f"{layer}.weight"
        return whole if self.module is not None else whole[len(self.name) + 1 :]

    def inner(self, layer: str) -> str:
        """Return the name of a layer inside the block's module, "" where it is the module itself."""
        return layer if self.module is not None else layer[len(self.name) + 1 :]


@dataclass(frozen=True, kw_only=True)
class BlockIO:
    """Inputs of one block and its float target, N samples.

    Attributes:
        inputs: leaves of the block's (args, kwargs): rows of N samples, or a value shared by all of them.
        batched: which of the leaves are rows.
        spec: how the leaves make up (args, kwargs).
        target: (N, ...) rows.
        reference: the same leaves in the float network, if they were recorded too.
        only: (M,) int64, the rows that count, all of them if None.
        device: of the network; rows may lie elsewhere until they are taken.
    """

    inputs: tuple[Any, ...]
    batched: tuple[bool, ...]
    spec: pytree.TreeSpec
    target: Samples
    reference: tuple[Any, ...] | None = None
    only: Tensor | None = None
    device: torch.device = HOST

    def __len__(self) -> int:
        return len(self.target if self.only is None else self.only)

    def part(self, index: Tensor) -> "BlockIO":
        """Return the samples at `index` (M,) as a recording that shares this one's rows."""
        return replace(self, only=index if self.only is None else self.only[index])

    def take(self, index: Tensor) -> "BlockIO":
        """Return the samples at `index` (M,), which lies on the host, in the memory of the network's device."""
        rows = index if self.only is None else self.only[index]

        def taken(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(rows_at(v, rows, self.device) if b else v for v, b in zip(leaves, self.batched, strict=True))

        reference = None if self.reference is None else taken(self.reference)
        target = rows_at(self.target, rows, self.device)
        return replace(self, inputs=taken(self.inputs), target=target, reference=reference, only=None)

    def mixed(self, share: float, generator: torch.Generator) -> "BlockIO":
        """Return a recording in memory with about `share` of the inputs' elements replaced by the float network's.

        QDrop (Wei et al. 2022, arXiv 2203.05740): each element is drawn by itself.

        Args:
            share: probability of an element to be the float network's; 0 returns this recording.
            generator: draws the elements.
        """
        if self.reference is None or share == 0:
            return self
        pairs = zip(self.inputs, self.reference, self.batched, strict=True)
        return replace(self, inputs=tuple(_mixed(v, f, share, generator) if b else v for v, f, b in pairs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All rows of a recording in memory, in a fixed order: inputs, target, inputs in the float network."""
        assert isinstance(self.target, Tensor)
        rows = [v for leaves in (self.inputs, self.reference or ()) for v, b in self._marked(leaves) if b]
        return (*rows, self.target)

    def _marked(self, leaves: tuple[Any, ...]) -> Iterable[tuple[Any, bool]]:
        return zip(leaves, self.batched, strict=True) if leaves else ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> "BlockIO":
        """Return the recording with other `tensors`."""
        *rows, target = tensors
        left = iter(rows)
        inputs, reference = (
            tuple(next(left) if b else v for v, b in self._marked(leaves))
            for leaves in (self.inputs, self.reference or ())
        )
        return replace(self, inputs=inputs, target=target, reference=reference or None)

    def single(self, inputs: tuple[Any, ...], target: Tensor) -> "BlockIO":
        """Return a recording of one sample like these, from leaves without their batch axis."""
        leaves = tuple(v[None] if b else v for v, b in zip(inputs, self.batched, strict=True))
        return replace(self, inputs=leaves, target=target[None])

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the block's args and kwargs."""
        args, kwargs = pytree.tree_unflatten(self.inputs, self.spec)
        return args, kwargs


def _mixed(value: Tensor, reference: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():  # timesteps and class labels are no activations
        return value
    # Drawn on the host, and so the same on every device.
    drawn = torch.rand(value.shape, generator=generator) < share
    return torch.where(drawn.to(value.device), reference, value)


def find_blocks(traced: Trace, quantized: Iterable[str]) -> tuple[list[Block], list[str]]:
    """Return the blocks in network order, and the quantized layers that no block covers.

    Args:
        traced: what `trace` saw.
        quantized: names of the quantized layers, in any order.

    Returns:
        The blocks, and the names of layers outside all of them, which are called more than once.
    """
    chosen = set(quantized)
    order = [layer.name for layer in traced.layers if layer.name in chosen]
    blocks: dict[str, list[str]] = {}
    loose = []
    for layer in order:
        # The outermost: layers that are learned together can make up for each other.
        owner = next((name for name in _outermost_first(layer) if _is_block(traced, name, order)), None)
        if owner is None:
            loose.append(layer)
        else:
            blocks.setdefault(owner, []).append(layer)
    return [Block(name=name, layers=tuple(layers)) for name, layers in blocks.items()], loose


def _outermost_first(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_block(traced: Trace, name: str, order: list[str]) -> bool:
    call = traced.calls.get(name)
    inside = sum(layer == name or layer.startswith(name + ".") for layer in order)
    attends = any(attention.rpartition(".")[0] == name for attention in traced.attentions)
    most = IN_TRANSFORMER if attends else MAX_LAYERS
    return call is not None and call.plain and call.count == 1 and inside <= most
