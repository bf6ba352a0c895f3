"""The temporal information block: all quantized layers that the timestep alone decides, reconstructed as one.

TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503) learns the rounding of a U-Net's time-embedding layer and of every
embedding projection together, before all other blocks and apart from them, so that the network's sense of the step
stays true:

    loss(t) = sum_i || g_i(h(t)) - g_hat_i(h_hat(t)) ||^2

    h    time embedding     g_i  embedding projection i     _hat  with quantized weights

These layers lie all over the network and are no module of it, so they are cut out of the graph that `torch.export`
sees, as a separate module: `t` in, the outputs of the last of them, side by side, out.
"""

import copy
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from calib.blocks import Block, BlockIO
from calib.data import NO_CONDITION, CalibrationSet, example_inputs
from calib.devices import HOST, device_of, on_device
from calib.errors import CalibError
from calib.silence import silenced
from calib.trace import PROBE_BATCH, Trace

NAME = "(temporal)"  # not an identifier, so not a module's name

_Calls = dict[fx.Node, tuple[str, str]]  # the nodes of layers: layer name, and which call of it


def find_block(
    model: nn.Module,
    traced: Trace,
    quantized: Collection[str],
    shape: tuple[int, ...],
    cond: Mapping[str, Tensor] = NO_CONDITION,
) -> list[Block]:
    """Return the temporal block of `model` in a list, an empty one if no quantized layer depends on the timestep alone.

    Its module maps t (N,) to (N, sum C_i), the outputs of the layers through which the step enters the rest of the
    network; weights keep their full names in it, and are copies.

    Args:
        model: the float network.
        traced: what `trace` saw of it.
        quantized: names of all layers that are quantized.
        shape: (C, H, W).
        cond: example conditions, at least one row each.

    Raises:
        CalibError: torch cannot export the network, or the layers cannot be traced in what it exports.
    """
    by_step = {layer.name for layer in traced.layers if layer.by_step}
    targets = by_step & set(quantized)
    if not targets:
        return []
    try:
        whole = _export(model, example_inputs(PROBE_BATCH, shape, 0, cond))
        last, names = _outputs(whole, by_step, targets)
        if not last:
            return []
        module = _cut(whole, last)
        # A trial run, so that a graph which cannot be cut fails here, where the error says what to do.
        module(torch.zeros(PROBE_BATCH, dtype=torch.int64, device=device_of(model)))
    except Exception as error:  # torch.export raises many kinds; all mean the same to a user
        raise _not_cut(error) from error
    layers = tuple(layer.name for layer in traced.layers if layer.name in names)
    return [Block(name=NAME, layers=layers, module=module)]


def record(module: nn.Module, data: CalibrationSet, micro_batch: int) -> BlockIO:
    """Pair the timesteps with the outputs of the block's float `module`.

    Args:
        module: from `find_block`, not yet quantized.
        data: N samples; only their t (N,) counts.
        micro_batch: samples a forward pass.

    Returns:
        A recording with inputs t (N,) and target (N, sum C_i).
    """
    with torch.no_grad():
        target = torch.cat([module(t.to(data.device)) for t in torch.split(data.t, micro_batch)])
    leaves, spec = pytree.tree_flatten(((data.t,), {}))
    return BlockIO(inputs=tuple(leaves), batched=(True,), spec=spec, target=target, device=data.device)


def _not_cut(error: Exception) -> CalibError:
    """Return the error for a network that torch.export does not take, with the first line of the reason."""
    reason = str(error).strip().splitlines()
    return CalibError(
        f"torch.export cannot take the layers that depend on the step alone out of this network: "
        f"{reason[0].rstrip('.') if reason else repr(error)}. Use --convention deploy, which keeps them float."
    )


def _export(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """Return the network as a graph without in-place operations, whose batch is free."""
    sizes = pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, inputs)
    device = device_of(model)
    with silenced("torch"), redirect_stderr(io.StringIO()), torch.no_grad():  # where it prints the graph when it fails
        # On the host, so that all devices get the same graph; it names the device of every tensor that it makes.
        program = torch.export.export(on_device(model, HOST), inputs, dynamic_shapes=sizes)
        program = program.run_decompositions({})  # none replaced; it only removes in-place operations
        whole = (program if device == HOST else move_to_device_pass(program, device)).module()
    assert isinstance(whole, fx.GraphModule)
    return whole


def _outputs(whole: fx.GraphModule, by_step: set[str], targets: set[str]) -> tuple[list[fx.Node], set[str]]:
    """Return the outputs through which `targets` layers act on the rest of the network, and the layers that do.

    A layer whose input not even the step decides (constant positions, say) is not among them.

    Args:
        whole: the network.
        by_step: its layers whose input does not depend on x.
        targets: those of them that are quantized.
    """
    t = _placeholders(whole)[1]
    calls = {node: call for node in whole.graph.nodes if (call := _call(node, by_step))}
    missing = targets - {name for name, _ in calls.values()}
    if missing:
        raise CalibError(f"its exported graph does not show {sorted(missing)}")
    last: list[fx.Node] = []
    names: set[str] = set()
    for node in calls:  # in graph order, so the outputs lie side by side in the order of the calls
        before = _ancestors([node])
        inside = targets & {calls[n][0] for n in before if n in calls}
        if inside and t in before and _is_last(node, calls):
            last.append(node)
            names |= inside
    return last, names


def _cut(whole: fx.GraphModule, last: Sequence[fx.Node]) -> fx.GraphModule:
    """Return the part of `whole` that leads from t (N,) to the nodes `last`, side by side (N, sum C_i)."""
    inputs, needed = _placeholders(whole), _ancestors(last)
    t = inputs[1]
    graph = fx.Graph()
    copies = {t: graph.placeholder("t")}
    batch = graph.call_function(torch.ops.aten.sym_size.int, (copies[t], 0))  # read at run time: any N will do
    for other in inputs:
        if other in needed and other is not t:  # only for its size: its values do not matter here
            example = other.meta["val"]
            shape, kind = (batch, *example.shape[1:]), {"dtype": example.dtype, "device": example.device}
            copies[other] = graph.call_function(torch.zeros, (shape,), kind)
    for node in whole.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = [graph.call_function(torch.reshape, (copies[node], (batch, -1))) for node in last]  # (N, ...) -> (N, C_i)
    graph.output(graph.call_function(torch.cat, (outputs, 1)))
    # A copy, since its weights are quantized while those of the network stay.
    return copy.deepcopy(fx.GraphModule(whole, graph)).requires_grad_(False)


def _placeholders(whole: fx.GraphModule) -> list[fx.Node]:
    """Return x, t and the conditions."""
    return [node for node in whole.graph.nodes if node.op == "placeholder"]


def _call(node: fx.Node, names: set[str]) -> tuple[str, str] | None:
    """Return which of the layers `names` the node was recorded in, and in which call of it."""
    stack = node.meta.get("nn_module_stack", {}) if node.op == "call_function" else {}
    return next(((name, key) for key, (name, _) in stack.items() if name in names), None)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all that they are computed from."""
    return _closure(nodes, lambda n: n.all_input_nodes)


def _is_last(node: fx.Node, calls: _Calls) -> bool:
    """Return whether the node gives a layer's output, and the network's output is reached from it past no other."""
    users = (user for user in node.users if calls.get(user) != calls[node])
    return any(n.op == "output" for n in _closure(users, lambda n: () if n in calls else n.users))


def _closure(start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return `start` and everything that `following` leads to from there."""
    seen: set[fx.Node] = set()
    waiting = list(start)  # a list, since recursion would be as deep as the network
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(following(node))
    return seen
