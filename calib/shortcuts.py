"""Find a network's shortcuts by watching it run: layers that lead around a block and are added to what it gives.

A shortcut is a pointwise layer (a linear one, or a convolution of kernel 1) with an input X, whose output is added to
a Z that is computed from X too, through a convolution of another kernel or through two layers and more:

    X -> weighted layers -> Z -+-> Z + S(X)
    X -> pointwise layer S ----+

So `x + linear(x)` has none (X itself is added), neither has `h + block(h)` with h = linear(x) (the block follows the
layer), nor `linear(silu(t)) + h`, whose input does not depend on the image. Between X and S, and between S and the sum,
there may be what only moves or scales values (GLUE), and S may be cut in two, as `calib.surgery` does where a shortcut
reads a concatenation.

The flow of values is followed by the identity of tensors. Only a little node is stored of each, not the tensor: what a
large network computes would not fit in memory at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
ADD = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
GLUE = frozenset(
    {"__getitem__", "chunk", "split", "narrow", "div", "__truediv__", "mul", "__mul__", "contiguous", "clone", "to"}
    | {"dropout", "reshape", "view", "flatten", "permute", "transpose", "interpolate", "avg_pool1d", "avg_pool2d"}
)


@dataclass(frozen=True, eq=False)
class _Node:
    """One tensor: the function that made it, and the nodes of the tensors that went in.

    `layer` and `pointwise` are of the weighted layer that it is the output of, if it is one.
    """

    function: str
    sources: tuple["_Node", ...]
    layer: str = ""
    pointwise: bool = False


class Flow(TorchFunctionMode):
    """While active, follows everything that is computed from `x`.

    Args:
        x: the image, (N, C, H, W).
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._nodes = WeakTensorKeyDictionary()
        self._nodes[x] = _Node("input", ())
        self._sums: list[_Node] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and note where its tensors came from."""
        out = func(*args, **(kwargs or {}))
        sources = tuple(dict.fromkeys(node for v in pytree.tree_leaves((args, kwargs)) if (node := self.of(v))))
        if sources:
            node = _Node(getattr(func, "__name__", ""), sources)
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._nodes[tensor] = node
            if node.function in ADD and len(sources) == 2:
                self._sums.append(node)
        return out

    def of(self, value: object) -> _Node | None:
        """Return the node of a tensor; None if `value` is none, or does not depend on the image."""
        if not isinstance(value, Tensor):
            return None
        node: _Node | None = self._nodes.get(value)  # type: ignore[no-untyped-call]
        return node

    def leave_layer(self, name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """Note that the weighted layer `name` computed `out` from `x`."""
        if (source := self.of(x)) is not None:
            self._nodes[out] = _Node("layer", (source,), layer=name, pointwise=_is_pointwise(module))

    def shortcuts(self) -> frozenset[str]:
        """Return the names of all layers that are shortcuts."""
        names = set[str]()
        for total in self._sums:
            for one, other in (total.sources, total.sources[::-1]):
                terms = _pointwise_terms(one)
                names |= {s.layer for s in terms if _leads_to(_behind_glue(s.sources[0]), other, around=terms)}
        return frozenset(names)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or all(size == 1 for size in getattr(module, "kernel_size", (0,)))


def _behind_glue(node: _Node) -> _Node:
    """Return the tensor whose values these are, moved or scaled."""
    while node.function in GLUE and len(node.sources) == 1:
        node = node.sources[0]
    return node


def _pointwise_terms(node: _Node) -> list[_Node]:
    """Return the outputs of pointwise layers that add up to a tensor; none if it has other terms too."""
    node = _behind_glue(node)
    if node.layer:
        return [node] if node.pointwise else []
    if node.function not in ADD:
        return []
    layers: list[_Node] = []
    for source in node.sources:
        terms = _pointwise_terms(source)
        if not terms:
            return []
        layers += terms
    return layers


def _leads_to(start: _Node, end: _Node, around: Sequence[_Node]) -> bool:
    """Return whether `end` is computed from `start` through one layer that is not pointwise, or through two layers.

    Ways through the outputs `around` do not count: what follows a layer is no block that it leads around.
    """
    waiting, seen = [(end, 0)], set[tuple[_Node, int]]()
    while waiting:
        node, depth = waiting.pop()
        if node is start:
            if depth >= 2:
                return True
            continue
        if (node, depth) in seen or node in around:
            continue
        seen.add((node, depth))
        if node.layer:
            depth = min(2, depth + (1 if node.pointwise else 2))
        waiting += [(source, depth) for source in node.sources]
    return False


@contextmanager
def follow(model: nn.Module, x: Tensor) -> Iterator[Flow]:
    """Follow what is computed from `x` while this is open, by function and by layer of `model`."""
    flow = Flow(x)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, out, name=name: flow.leave_layer(name, module, args[0], out)
                )
            )
    try:
        with torch.no_grad(), flow:
            yield flow
    finally:
        for handle in handles:
            handle.remove()
