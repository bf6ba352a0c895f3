"""What a network is made of, from running it: its layers, what their inputs depend on, and the calls of its modules.

Goes by structure, never by name, so that any module called as `(x, t) -> epsilon`, or `(x, t, cond)`, will do. Two
forward passes with the same `t` and another `x`, or `cond`, show which layers depend on the timestep alone; call counts
show which layers are run by other means than their own `forward` (fused attention reads the weights of its projections
directly).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from calib.attention import AttentionIntercept, is_plain
from calib.data import NO_CONDITION, example_inputs
from calib.devices import device_of
from calib.errors import CalibError
from calib.shortcuts import follow

QUANTIZABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Linear)
OTHER_WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.Embedding,
)
_SIMPLE = (Tensor, bool, int, float, str, type(None))
PROBE_BATCH = 3


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one forward pass showed of a module."""

    name: str
    count: int
    digest: bytes  # of the first tensor input, its shape included
    plain: bool  # tensors and plain values in, one tensor out, the batch first in both


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weighted layer, in call order.

    Attributes:
        name: of its module.
        kind: its class.
        quantizable: whether there is a quantized form of that class here, and its weight is a plain parameter.
        calls: how often its own `forward` runs in one pass of the network.
        depends_on_x: whether its input changes with the image; False where timestep or conditioning alone decide it.
        by_step: whether its input is decided by the timestep alone.
        shortcut: whether it leads around a block (`calib.shortcuts`).
        downsampling: whether it is a convolution of stride 2 or more.
    """

    name: str
    kind: str
    quantizable: bool
    calls: int
    depends_on_x: bool
    by_step: bool
    shortcut: bool = False
    downsampling: bool = False


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Layers in call order, and every module's call; `calls` is keyed by module name.

    `attentions` are the modules that call `scaled_dot_product_attention` themselves; False where they give it a mask,
    another option, or operands whose first axis is not the batch.
    """

    layers: tuple[Layer, ...]
    calls: Mapping[str, Call]
    attentions: Mapping[str, bool]


def trace(model: nn.Module, shape: tuple[int, ...], timesteps: int, cond: Mapping[str, Tensor] = NO_CONDITION) -> Trace:
    """Run `model` on noise of `shape` (C, H, W) at one timestep below `timesteps` and return what was called.

    Args:
        model: the network, called as (x, t), or (x, t, cond).
        shape: (C, H, W).
        timesteps: number of training timesteps.
        cond: example conditions, at least one row each; they are probed with noise, integers with 0 and 1.

    Raises:
        CalibError: the output is not one tensor of the input's shape.
    """
    generator = torch.Generator().manual_seed(0)
    like, t, *condition = example_inputs(PROBE_BATCH, shape, timesteps // 2, cond, device_of(model))
    x, other_x = (_probe(like, k, generator) for k in range(2))
    rows, other_rows = (
        [{name: _probe(value, k, generator) for name, value in one.items()} for one in condition] for k in range(2)
    )
    with follow(model, x) as flow:
        first, attentions = _calls(model, (x, t, *rows))
    by_x = _calls(model, (other_x, t, *rows))[0]
    by_cond = _calls(model, (x, t, *other_rows))[0] if condition else first
    layers = []
    shortcuts = flow.shortcuts()
    modules = dict(model.named_modules())
    for name, call in first.items():
        if isinstance(modules[name], QUANTIZABLE + OTHER_WEIGHTED):
            # Inputs that change with x, or with the conditions, are not those of the step alone.
            moved = call.digest != by_x[name].digest
            still = not moved and call.digest == by_cond[name].digest
            layer = _layer(name, modules[name], call.count, depends_on_x=moved, by_step=still)
            layers.append(replace(layer, shortcut=name in shortcuts))
    for name, module in modules.items():  # never called by their own forward
        if isinstance(module, QUANTIZABLE) and name not in first:
            layers.append(_layer(name, module, 0, depends_on_x=True, by_step=False))
    return Trace(layers=tuple(layers), calls=first, attentions=attentions)


def _probe(like: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return noise, or the number `k` where `like` is of integers."""
    if not like.is_floating_point():
        return torch.full_like(like, k)
    return torch.randn(like.shape, generator=generator).to(like.device)


def _layer(name: str, module: nn.Module, calls: int, *, depends_on_x: bool, by_step: bool) -> Layer:
    return Layer(
        name=name,
        kind=type(module).__name__,
        # A weight that is computed at each call has no codes that could stand in its place.
        quantizable=isinstance(module, QUANTIZABLE) and "weight" in module._parameters,
        calls=calls,
        depends_on_x=depends_on_x,
        by_step=by_step,
        downsampling=any(stride > 1 for stride in getattr(module, "stride", ())),
    )


def _calls(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, Call], dict[str, bool]]:
    """Return calls in order of first entry, and `Trace.attentions`."""
    x: Tensor = inputs[0]
    with _watched(model, len(x)) as (order, attentions), torch.no_grad():
        out = model(*inputs)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        returned = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise CalibError(f"The network must return one tensor of its input's shape {tuple(x.shape)}; found {returned}.")
    return order, attentions


@contextmanager
def _watched(model: nn.Module, rows: int) -> Iterator[tuple[dict[str, Call], dict[str, bool]]]:
    """Yield the calls and the attentions of `_calls`, which fill while the model runs on `rows` samples."""
    order: dict[str, Call] = {}
    running: list[str] = []  # names of the modules that are being called, the innermost last
    attentions: dict[str, bool] = {}

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        batched = all(len(v) == rows for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        # One call that is not plain is enough to keep the products of the whole module float.
        attentions[running[-1]] = is_plain(*args, **kwargs) and batched and attentions.get(running[-1], True)
        return functional.scaled_dot_product_attention(*args, **kwargs)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(name)
            order[name] = _entered(name, order.get(name), args, kwargs, rows)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
            running.pop()
            one = isinstance(out, Tensor) and out.ndim > 0 and len(out) == rows
            call = order[name]
            order[name] = Call(name=name, count=call.count, digest=call.digest, plain=call.plain and one)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with AttentionIntercept(attention):
            yield order, attentions
    finally:
        for handle in handles:
            handle.remove()


def _entered(name: str, earlier: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Call:
    """Return the call of a module that was entered with these arguments, added to an `earlier` one of the same pass."""
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    simple = all(isinstance(v, _SIMPLE) for v in (*args, *kwargs.values()))
    batched = bool(tensors) and tensors[0].ndim > 0 and len(tensors[0]) == rows
    return Call(
        name=name,
        count=1 if earlier is None else earlier.count + 1,
        digest=_digest(tensors[0]) if tensors else b"",
        plain=simple and batched and (earlier is None or earlier.plain),
    )


def _digest(x: Tensor) -> bytes:
    sha = hashlib.sha256(str(tuple(x.shape)).encode())
    # As float32, since numpy has no bfloat16.
    sha.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.digest()


def group_by_input(traced: Trace, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group layers that read the same tensor, as q, k and v of one attention do.

    Args:
        traced: what `trace` saw.
        names: layers to group.

    Returns:
        Groups of names, in call order inside and out. A layer that is called several times is alone in its group.
    """
    chosen = set(names)
    groups: dict[object, list[str]] = {}
    for name in (layer.name for layer in traced.layers if layer.name in chosen):
        call = traced.calls[name]
        groups.setdefault(call.digest if call.count == 1 else name, []).append(name)
    return [tuple(group) for group in groups.values()]
