"""Which of the collected samples calibrate weights: how many of each sampling step's, by one of RULES.

    uniform    all of every k-th step's (Q-Diffusion, arXiv 2302.04304)
    gaussian   as many as a normal distribution over the steps has there, the ends included (PTQ4DM, arXiv 2211.15736)
    density    as the density and the variety of a step's features say (EDA-DM, arXiv 2401.04585)

All rules choose the same number of samples in all. Steps are counted from the cleanest, as in the papers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.choices import SelectionRule
from calib.config import QuantConfig, SelectionConfig
from calib.data import CalibrationSet, thin_steps
from calib.errors import CalibError
from calib.seeds import generator_for

Shares = Callable[[CalibrationSet, SelectionConfig, nn.Module], Tensor]


def select(data: CalibrationSet, config: QuantConfig, model: nn.Module) -> CalibrationSet:
    """Return the samples that calibrate weights, in the order of `data`.

    Args:
        data: all of them.
        config: the rule, and how many steps' worth of samples (`weight_steps`) it may take.
        model: the float network, whose features the rule "density" compares.
    """
    uniform = thin_steps(data, config.weight_steps)
    if config.selection.rule is SelectionRule.UNIFORM:
        return uniform
    steps, position = torch.unique(data.step, return_inverse=True)
    shares = RULES[config.selection.rule](data, config.selection, model)
    counts = apportion(shares, len(uniform), torch.bincount(position))
    drawn = generator_for(config.seed, "selection")
    members = [(position == k).nonzero()[:, 0] for k in range(len(steps))]
    chosen = [m[torch.randperm(len(m), generator=drawn)[:n]] for m, n in zip(members, counts.tolist(), strict=True)]
    return data.take(torch.cat(chosen).sort().values)


def apportion(shares: Tensor, total: int, most: Tensor) -> Tensor:
    """Return whole numbers (S,) in proportion to `shares` (S,) that add up to `total`, none above `most` (S,).

    What a step cannot take goes to the others in proportion; fractions are rounded so that the largest are rounded up.

    Args:
        shares: not negative; they need not add up to 1.
        total: what is shared out, at most the sum of `most`.
        most: int64.

    >>> apportion(torch.tensor([6.0, 3.0, 1.0]), 10, torch.tensor([4, 9, 9])).tolist()
    [4, 5, 1]
    """
    ideal, full = torch.zeros(len(shares), dtype=torch.float64), torch.zeros(len(shares), dtype=torch.bool)
    while True:
        open_shares = torch.where(full, 0.0, shares.double().clamp(min=1e-12))
        ideal = torch.where(full, most.double(), open_shares / open_shares.sum() * (total - most[full].sum()))
        over = ideal > most
        if not bool((over & ~full).any()):
            break
        full |= over
    counts = ideal.floor().long()
    rest = torch.where(counts < most, ideal - counts, -1.0)
    counts[rest.argsort(descending=True, stable=True)[: total - int(counts.sum())]] += 1
    return counts


def gaussian(data: CalibrationSet, config: SelectionConfig, model: nn.Module) -> Tensor:
    """Return the mass that N(mean S, (deviation S)^2), clipped to the S steps, has at each of them."""
    count = len(torch.unique(data.step))
    edges = (torch.arange(1, count) - 0.5 - config.mean * count) / (config.deviation * count)
    below = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)])
    return below.diff().flip(0)  # step 0 is the noisiest


def density(data: CalibrationSet, config: SelectionConfig, model: nn.Module) -> Tensor:
    """Return D + lambda V of each step, both scaled to [0, 1] (EDA-DM's timestep-aware density and variety).

    D counts the steps whose features differ by at most `radius` of the mean difference, as a mean squared error; the
    paper's radii, 0.3 and 3.0, are absolute and belong to its models. V sums 1 - cosine, along the channels, to the
    features of all steps.
    """
    features = step_features(data, config.images, model)  # (S, N, C, H, W)
    flat = features.flatten(1)
    errors = torch.stack([(flat - one).square().mean(1) for one in flat])  # (S, S)
    cosines = torch.stack(
        [functional.cosine_similarity(features, one[None], dim=2).flatten(1).mean(1) for one in features]
    )
    near = (errors <= config.radius * errors.mean()).sum(1).float()
    return _unit(near) + config.variety * _unit((1 - cosines).sum(1))


def step_features(data: CalibrationSet, images: int, model: nn.Module) -> Tensor:
    """Return what the middle of the network sees of each step's first samples, (S, images, C, H, W).

    The middle is the middle one of the convolutions whose input is smallest.

    Raises:
        CalibError: the network has no convolutions.
    """
    sizes: dict[str, int] = {}
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[name] = args[0][0, 0].numel()  # (N, C, H, W) -> H * W
            seen[name] = args[0]

        return note

    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise CalibError("The rule 'density' compares what a convolution sees; this network has none: take another.")
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in convolutions.items()]
    features, middle = [], ""
    try:
        for step in torch.unique(data.step):
            index = (data.step == step).nonzero()[:images, 0]
            with torch.no_grad():
                model(*data.inputs(index))
            if not middle:
                smallest = [name for name, size in sizes.items() if size == min(sizes.values())]  # in call order
                middle = smallest[len(smallest) // 2]
            features.append(seen[middle].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(features)


def _unit(values: Tensor) -> Tensor:
    """Scale to [0, 1]; equal values give zeros."""
    return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)


RULES: dict[SelectionRule, Shares] = {SelectionRule.GAUSSIAN: gaussian, SelectionRule.DENSITY: density}
