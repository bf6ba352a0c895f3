"""The two products inside attention, softmax(q k^T) v, as something that can be observed and quantized.

Networks call `scaled_dot_product_attention`, whose operands no module's input or output shows. `intercept` puts this
module's plain form of it in its place. The queries carry the softmax scale, as they do in our ONNX graphs, so that what
is rounded here is to the bit what is rounded there. (PyTorch's MultiheadAttention calls it out of reach, inside a
function that is dispatched as one: its products stay float.)
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from calib.errors import CalibError

OPERANDS = ("query", "key", "value", "probability")


class AttentionIntercept(TorchFunctionMode):
    """While it is active, calls of `scaled_dot_product_attention` go to `attention`, with the same arguments."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or what replaces it."""
        call = self._attention if func is functional.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def intercept_attention(module: nn.Module, each: Callable[[str, Tensor], Tensor]) -> list[RemovableHandle]:
    """Make `module` compute its attention with every operand replaced by each(one of OPERANDS, operand).

    Modules inside it do the same, unless they are intercepted themselves.

    Args:
        module: one that calls `scaled_dot_product_attention`.
        each: called with the name of an operand and its value, (..., L, D); returns a value of the same shape.

    Returns:
        Handles; to remove them undoes it.
    """
    # A stack, since a module may run inside another, and the innermost intercept counts.
    running: list[ExitStack] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(ExitStack())
        running[-1].enter_context(AttentionIntercept(partial(attend, each)))

    def leave(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        running.pop().close()

    # Left after an exception as well: a mode that stays active would change calls far from here.
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Return whether `attend` can compute a call of `scaled_dot_product_attention` with these arguments."""
    return attn_mask is None and not (dropout_p or is_causal or enable_gqa)


def attend(
    each: Callable[[str, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *more: Any,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """Return softmax(scale q k^T) v, (..., L, E), with every operand replaced by each(name, operand).

    Args:
        each: what an operand, known by its name in OPERANDS, is replaced by.
        query: (..., L, D).
        key: (..., S, D).
        value: (..., S, E).
        more: as for `scaled_dot_product_attention`.
        scale: 1 / sqrt(D) if None.
        others: as for `scaled_dot_product_attention`.

    Raises:
        CalibError: there is a mask, or another option.
    """
    if not is_plain(query, key, value, *more, **others):
        raise CalibError("Attention with a mask or other options came where there was none before.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Scaled before it is rounded, and so in our graphs.
    logits = each("query", query * scale) @ each("key", key).mT  # (..., L, D) x (..., D, S) -> (..., L, S)
    return each("probability", torch.softmax(logits, -1)) @ each("value", value)
