"""Do the probabilities inside attention follow a power law? Then most are tiny, and powers of two suit them better.

TCAQ-DM (arXiv 2412.16700), its distribution-aware quantizer: a power law and an alternative are fitted by maximum
likelihood, and the sign of the log likelihood ratio decides. The paper does not name its alternative; an exponential
is taken here, as Clauset et al. 2009 (arXiv 0706.1062) do for heavy tails, of the values x above their mean m:

    p(x) = (a - 1) / m (x / m)^-a,  a = 1 + 1 / mean ln(x / m)        q(x) = l exp(-l (x - m)),  l = 1 / (mean x - m)
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from calib.attention import intercept_attention
from calib.data import CalibrationSet

BATCHES = 16  # of samples, on which the probabilities are looked at
BATCH = 8  # samples each
VALUES = 4096  # drawn from the probabilities of one product in one batch


def log_likelihood_ratio(values: Tensor) -> float:
    """Return the mean of ln p(x) - ln q(x) over the values above their mean, both laws fitted; 0 if there are none.

    Args:
        values: not negative.
    """
    values = values.double().flatten()
    least = values.mean()  # m
    x = values[values > least]
    if len(x) == 0 or float(least) == 0:
        return 0.0
    logs = (x / least).log()
    rate = 1 / (x.mean() - least)  # l
    exponent = 1 + 1 / logs.mean()  # a
    power = ((exponent - 1) / least).log() - exponent * logs
    # x is above its mean m, where both laws have all of their mass, so the likelihoods can be compared.
    return float((power - (rate.log() - rate * (x - least))).mean())


def find_heavy_tails(
    network: nn.Module, products: Sequence[str], data: CalibrationSet, generator: torch.Generator
) -> frozenset[str]:
    """Return the modules whose attention has probabilities that follow a power law rather than an exponential.

    Args:
        network: its weights quantized.
        products: names of modules with attention.
        data: what the float network saw; batches are drawn from all of it.
        generator: draws the batches and the values.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in products}

    def draw(name: str, operand: str, value: Tensor) -> Tensor:
        if operand == "probability":
            flat = value.flatten()  # (N, heads, L, S) -> (N * heads * L * S,)
            drawn = torch.randint(len(flat), (VALUES,), generator=generator).to(flat.device)
            seen[name].append(flat[drawn].cpu())
        return value  # as it is: this only looks

    handles = [
        handle for name in products for handle in intercept_attention(network.get_submodule(name), partial(draw, name))
    ]
    try:
        order = torch.randperm(len(data), generator=generator)[: BATCHES * BATCH]
        with torch.no_grad():
            for index in torch.split(order, BATCH):
                network(*data.inputs(index))
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, values in seen.items() if log_likelihood_ratio(torch.cat(values)) > 0)
