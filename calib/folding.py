"""Weights that are worked out at each call, and batch norms behind a layer, folded into plain weights.

A layer is quantized by its weight. Where that is the product of a length and a direction (weight norm), or divided by
its largest singular value (spectral norm), it is computed once here. A batch norm in evaluation mode is a factor and an
offset for each channel, which the layer before it takes over: the exporter would do the same, and the graph would then
hold another weight than the one that was calibrated.
"""

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from calib.shared_copy import copy_sharing_tensors
from calib.silence import silenced

_REMOVERS: dict[type, Any] = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
_OPERATORS = ("conv1d", "conv2d", "linear")  # of the layers that a batch norm can be folded into


def fold_weights(model: nn.Module) -> nn.Module:
    """Return the network with every computed weight as a plain one; `model` itself, which is not changed, if none is.

    Known are parametrizations (`torch.nn.utils.parametrize`) and the older `weight_norm` and `spectral_norm`.
    """
    if not any(parametrize.is_parametrized(m) or _norms(m) for m in model.modules()):
        return model
    result = copy_sharing_tensors(model)
    for module in list(result.modules()):
        for name, remove in _norms(module):
            remove(module, name)
        if parametrize.is_parametrized(module):
            _unparametrize(module)
    return result.requires_grad_(False)


def fold_batch_norms(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Return the network with every batch norm that directly follows a layer folded into that layer.

    `model` is not changed, and returned itself where there is none, or where torch cannot export the network, so that
    it is not known what follows what.

    Args:
        model: in evaluation mode.
        inputs: what it is called with, two samples or more.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    try:
        with silenced("torch"), torch.no_grad():
            graph = torch.export.export(model, inputs).graph
    except Exception:  # torch.export raises many kinds; whoever needs the graph itself reports them
        return model
    pairs = _pairs(model, graph)
    if not pairs:
        return model
    result = copy_sharing_tensors(model)
    for layer_name, norm_name in pairs.items():
        layer, norm = result.get_submodule(layer_name), result.get_submodule(norm_name)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        result.set_submodule(layer_name, fuse(layer, norm).requires_grad_(False))
        result.set_submodule(norm_name, nn.Identity())
    return result


def _norms(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the names of a module's parameters that an older norm computes before each call, and what removes it."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    return [(str(hook.name), _REMOVERS[type(hook)]) for hook in hooks if type(hook) in _REMOVERS]


def _unparametrize(module: nn.Module) -> None:
    """Make the parametrized tensors of a copied module plain parameters, in place.

    `remove_parametrizations` would take the properties from the class, which the original has in common with its copy.
    """
    values = {name: getattr(module, name).detach() for name in module.get_submodule("parametrizations")._modules}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _pairs(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Return the name of each layer whose output only a batch norm reads -> the name of that norm.

    Both have to be called once: a layer that also runs elsewhere must not change for one norm.
    """
    owners = {node: name for node in graph.nodes if (name := _owner(node))}
    modules = {name: model.get_submodule(name) for name in set(owners.values())}
    operators = {node: str(node.target).split(".")[1] for node in owners}
    calls = Counter(id(modules[owners[node]]) for node in owners if operators[node] in (*_OPERATORS, "batch_norm"))
    found = {}
    for node, name in owners.items():
        users = list(node.users)
        if operators[node] not in _OPERATORS or len(users) != 1 or users[0] not in owners:
            continue
        norm = modules[owners[users[0]]]
        plain = type(modules[name]) in (nn.Conv1d, nn.Conv2d, nn.Linear)
        # Without running statistics a norm takes those of the batch, and is no fixed factor.
        fixed = isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
        if plain and fixed and operators[users[0]] == "batch_norm" and calls[id(norm)] == calls[id(modules[name])] == 1:
            found[name] = owners[users[0]]
    return found


def _owner(node: fx.Node) -> str | None:
    """Return the name of the module whose forward calls an operator, None for what is no operator of PyTorch's."""
    stack = node.meta.get("nn_module_stack", {}) if node.op == "call_function" else {}
    if not stack or not str(node.target).startswith("aten."):
        return None
    return str(list(stack.values())[-1][0])
