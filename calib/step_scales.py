"""Step sizes of each sampling step, learned from the values a layer sees there; all are known before sampling starts.

Legend: t timestep, s(t) step size, x the values seen at t, Q_s(x) = s clamp(round(x / s)), phi(t) sines and cosines.

    network   s(t) = s_0 exp(f(phi(t))), f a small perceptron (TDQ, arXiv 2306.02316): steps near each other share
              what they know, and steps that were not calibrated get a size too
    groups    s(t) = s_g(t): G sizes for all steps, and an assignment g that is learned as probabilities,
              x_hat = sum_g softmax(a_t)_g Q_{s_g}(x), with a penalty on their entropy, from the steps whose group is
              most uncertain (after ADP-DM, arXiv 2305.18723)

Both minimise the mean of |x - x_hat|^2 / |x|^2 over the steps, rounding passed through as in LSQ. ADP-DM groups
channels as well, for which no integer convolution has scales; here a step is grouped as a whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.affine import integer_range, round_straight_through
from calib.choices import StepScales
from calib.config import ActivationConfig
from calib.data import CalibrationSet
from calib.plan import Grid
from calib.seeds import generator_for

VALUES, IMAGES = 8192, 16  # of a layer at each step, from as many images; fewer would not show how far values reach
ITERATIONS, RATE = 150, 0.03
FREQUENCIES, HIDDEN = 8, 16  # of `network`
GROUPS, ENTROPY = 8, 0.01  # of `groups`
SHARE, RISK = 0.5, 0.05  # of `groups`: steps an iteration learns from; a use of a step, beside its entropy


def learn_step_grids(
    model: nn.Module,
    layer_groups: Sequence[tuple[str, ...]],
    data: CalibrationSet,
    config: ActivationConfig,
    num_train: int,
    seed: int,
) -> dict[str, tuple[Grid, ...]]:
    """Return the input grids of every layer, the widest first, symmetric, a step size for each timestep, rising.

    Args:
        model: its weights quantized.
        layer_groups: the layers' names, those that read the same tensor and so share its grids together.
        data: what the float network saw.
        config: bits, and which rule.
        num_train: number of training timesteps.
        seed: of everything drawn.

    Returns:
        By layer name, a grid for each of the config's widths; its `ratio` has one number for each of the S timesteps.
    """
    t = torch.unique(data.t)
    # One layer of a group is enough: the others read the same tensor.
    seen = sample_values(model, [first for first, *_ in layer_groups], data, seed)

    def grid(name: str, bits: int) -> Grid:
        sizes = RULES[config.sizes](seen[name], t / num_train, bits, generator_for(seed, name, "sizes"))
        most = float(sizes.max())
        return Grid(scale=most, bits=bits, zero=(0,) * len(t), ratio=tuple((sizes / torch.tensor(most)).tolist()))

    grids: dict[str, tuple[Grid, ...]] = {}
    for names in layer_groups:
        grids |= dict.fromkeys(names, tuple(grid(names[0], bits) for bits in (config.bits, *config.narrower)))
    return grids


def sample_values(model: nn.Module, layers: Sequence[str], data: CalibrationSet, seed: int) -> dict[str, Tensor]:
    """Return VALUES values of every layer's input at every step, by rising timestep, (S, VALUES).

    Args:
        model: its weights quantized.
        layers: their names.
        data: what the float network saw; the first IMAGES samples of each step are run.
        seed: of the drawn values.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen: dict[str, Tensor] = {}
    drawn = generator_for(seed, "values")

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            before = [seen[name]] if name in seen else []  # by an earlier call in this pass
            seen[name] = torch.cat([*before, args[0].flatten()])

        return gather

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        for t in torch.unique(data.t):
            index = (data.t == t).nonzero()[:IMAGES, 0]
            seen.clear()
            with torch.no_grad():
                model(*data.inputs(index))
            for name in layers:
                # Drawn with replacement: a small layer has fewer than VALUES.
                chosen = torch.randint(len(seen[name]), (VALUES,), generator=drawn).to(seen[name].device)
                # On the host, where the sizes are learned: they are few numbers, and there the same on every machine.
                values[name].append(seen[name][chosen].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(parts) for name, parts in values.items()}


def scales_by_network(values: Tensor, t: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Return s(t) (S,) by a perceptron.

    Args:
        values: (S, K) what was seen.
        t: (S,) in [0, 1).
        bits: width of the grid.
        generator: draws the perceptron's first weights.
    """
    angles = math.pi * t[:, None] * 2.0 ** torch.arange(FREQUENCIES)  # (S, F)
    phi = torch.cat([angles.sin(), angles.cos()], 1)  # (S, 2F)
    into = (torch.randn(2 * FREQUENCIES, HIDDEN, generator=generator) / (2 * FREQUENCIES) ** 0.5).requires_grad_()
    bias = torch.zeros(HIDDEN, requires_grad=True)
    out = torch.zeros(HIDDEN, requires_grad=True)  # 0, so that f is 0 at first and all steps start from s_0
    first = _first_size(values, bits).log().mean().clone().requires_grad_()

    def sizes() -> Tensor:
        return (first + nn.functional.silu(phi @ into + bias) @ out).exp()

    _descend([into, bias, out, first], lambda: _error(values, _rounded(values, sizes()[:, None], bits)))
    return sizes().detach()


def scales_by_groups(values: Tensor, t: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Return s(t) (S,), at most GROUPS different ones; arguments as for `scales_by_network`."""
    start = _first_size(values, bits).log()
    # Sizes are learned as logarithms, which keeps them positive; at first they are spread over those of the steps.
    logs = torch.quantile(start, torch.linspace(0.05, 0.95, GROUPS)).requires_grad_()
    # (S, G): a step leans towards the groups whose size is close to its first one.
    scores = (-(start[:, None] - logs.detach()).abs()).clone().requires_grad_()
    used = torch.zeros(len(values))

    def objective() -> Tensor:
        chosen = most_uncertain(_entropy(scores.detach()), used)
        used[chosen] += 1
        shares, seen = torch.softmax(scores[chosen], 1), values[chosen]  # (B, G), (B, K)
        mixed = (shares[:, None] * _rounded(seen[..., None], logs.exp(), bits)).sum(2)  # (B, K, G) -> (B, K)
        return _error(seen, mixed) + ENTROPY * _entropy(scores[chosen]).mean()

    _descend([logs, scores], objective)
    return logs.detach().exp()[scores.argmax(1)]


def most_uncertain(entropy: Tensor, used: Tensor) -> Tensor:
    """Return the steps (B,) to learn from next: assignments of most entropy, less a penalty on those often used.

    ADP-DM's active selection, which minimises the structural risk.

    >>> most_uncertain(torch.tensor([0.1, 2.0, 1.9, 0.2]), torch.zeros(4)).tolist()
    [1, 2]
    """
    return (entropy - RISK * used).topk(math.ceil(len(entropy) * SHARE)).indices


def _entropy(scores: Tensor) -> Tensor:
    shares = torch.softmax(scores, 1)
    return -(shares * shares.clamp(min=1e-12).log()).sum(1)  # (S, G) -> (S,); 0 ln 0 is 0


def _first_size(values: Tensor, bits: int) -> Tensor:
    """Return the step size (S,) whose grid reaches each step's largest value."""
    return values.abs().amax(1).clamp(min=1e-6) / integer_range(bits)[1]


def _rounded(values: Tensor, size: Tensor, bits: int) -> Tensor:
    low, high = integer_range(bits)
    return round_straight_through(values / size).clamp(low, high) * size


def _error(values: Tensor, rounded: Tensor) -> Tensor:
    # Relative to each step's mean square, so that steps of small values count as much as those of large ones.
    return ((values - rounded).square().mean(1) / values.square().mean(1).clamp(min=1e-12)).mean()


def _descend(parameters: Sequence[Tensor], objective: Callable[[], Tensor]) -> None:
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    for _ in range(ITERATIONS):
        optimiser.zero_grad()
        torch.autograd.backward(objective())
        optimiser.step()


RULES: Mapping[StepScales, Callable[[Tensor, Tensor, int, torch.Generator], Tensor]] = {
    StepScales.NETWORK: scales_by_network,
    StepScales.GROUPS: scales_by_groups,
}
