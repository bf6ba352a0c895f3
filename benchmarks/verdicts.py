"""Sentences about the results, written from the numbers alone: which row leads, by how much, and is it chance?"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from gaq_export.comparison.results import CellScores, Table
from gaq_export.comparison.tables import BASELINE, mean_sd

GOAL = 0.5  # share of the baseline's squared error that learned sample weights should remove


def standing(setting: str, table: Table) -> str:
    """Say which row has the highest mean SQNR, and whether it leads the baseline by more than chance might."""
    shared = set.intersection(*(set(seeds) for seeds in table.values())) if table else set()
    if len(table) < 2 or not shared:
        return f"{setting}: fewer than two rows have a seed in common, so there is nothing to compare."
    means = {row: statistics.fmean(seeds[s].mean_db for s in shared) for row, seeds in table.items()}
    best, second = sorted(means, key=lambda row: -means[row])[:2]
    if means[best] == means[second]:
        first = ", ".join(f"`{row}`" for row in means if means[row] == means[best])
        return f"{setting}: {first} share the highest mean SQNR, {means[best]:.2f} dB."
    text = f"{setting}: `{best}` has the highest mean SQNR, {means[best]:.2f} dB"
    if BASELINE not in table:
        return f"{text}; `{BASELINE}` was not measured."
    rival = second if best == BASELINE else BASELINE
    leads = [table[best][s].mean_db - table[rival][s].mean_db for s in sorted(shared)]
    return f"{text}. Its lead over `{rival}`, seed by seed, is {mean_sd(leads, 3)} dB: {_certainty(leads)}."


def _certainty(differences: Sequence[float]) -> str:
    n = len(differences)
    if n < 2:
        return "one seed, so how much of it is chance is unknown"
    error = statistics.stdev(differences) / math.sqrt(n)
    more = statistics.fmean(differences) > 2 * error
    return f"{'more' if more else 'not more'} than twice its standard error ({error:.3f} dB, n = {n})"


def share(table: Table, row: str, error: Callable[[CellScores], float]) -> list[float]:
    """Return, seed by seed, the share of the baseline's squared error that `row` removes; below 0 if it adds some."""
    base = table.get(BASELINE, {})
    return [1 - error(m) / error(base[seed]) for seed, m in table[row].items() if seed in base]


def learned(setting: str, table: Table, row: str) -> list[str]:
    """Return the paragraphs about the row that the benchmark is about."""
    if not (table.get(row, {}).keys() & table.get(BASELINE, {}).keys()):
        return [f"{setting}: `{row}` and `{BASELINE}` have no seed in common."]
    return [distance_closed(setting, table, row), block_losses(setting, table, row)]


def distance_closed(setting: str, table: Table, row: str) -> str:
    """Say how much of the way from the baseline to the float network `row` covers, against the goal."""
    parts = []
    for what, error in (("weights and activations", lambda m: m.error), ("weights only", lambda m: m.weights_error)):
        shares = [100 * v for v in share(table, row, error)]
        each = ", ".join(f"{v:.1f}" for v in shares)
        reached = statistics.fmean(shares) >= 100 * GOAL
        verdict = f"the goal of {100 * GOAL:.0f} % is {'reached' if reached else 'not reached'}"
        parts.append(f"{what}, {mean_sd(shares, 1)} % (seeds: {each}); {verdict}")
    weights = mean_sd([100 * m.weights_error / m.error for m in table[BASELINE].values()], 1)
    return (
        f"{setting}: of the way from `{BASELINE}` to the float network, 1 - MSE of `{row}` / MSE of `{BASELINE}` in "
        f"the predicted noise, `{row}` covers: {'. With '.join(parts)}. With float activations "
        f"`{BASELINE}` has {weights} % of the error that it has with rounded ones: weights without any error would "
        "cover about as much, no more."
    )


def block_losses(setting: str, table: Table, row: str) -> str:
    """Say in which blocks `row` ends with a lower loss on the training samples than the baseline, and by how much."""
    seeds = sorted(table[row].keys() & table[BASELINE].keys())
    means = {
        block: statistics.fmean(table[row][s].blocks[block] / table[BASELINE][s].blocks[block] for s in seeds)
        for block in table[row][seeds[0]].blocks
    }
    least, most = (choose(means, key=lambda block: means[block]) for choose in (min, max))
    return (
        f"{setting}: block by block, with the inputs that each had, `{row}` has {means[least]:.3f} (`{least}`) to "
        f"{means[most]:.3f} (`{most}`) times the loss of `{BASELINE}` on the training samples, {len(means)} blocks, "
        f"median {statistics.median(means.values()):.3f}; mean over seeds."
    )


def chance_beyond(errors: float, n: int) -> float:
    """Return how often chance alone gives a mean of n normal values beyond `errors` standard errors, either side.

    That is Student's t with n - 1 degrees of freedom, integrated numerically.

    >>> round(chance_beyond(2, 3), 3)
    0.184
    """
    v = n - 1
    x = np.linspace(-errors, errors, 20_001)
    density = math.gamma((v + 1) / 2) / (math.sqrt(v * math.pi) * math.gamma(v / 2)) * (1 + x**2 / v) ** (-(v + 1) / 2)
    return float(1 - np.trapezoid(density, x))


def caution(seeds: int) -> str:
    """Say what twice the standard error is worth with so many seeds."""
    if seeds < 2:
        return "One seed: no spread and no standard error can be given."
    often = f"{100 * chance_beyond(2, seeds):.0f} times in 100"
    return (
        f"With {seeds} seeds chance alone exceeds twice the standard error {often} (Student's t), and the highest of "
        "several rows is a choice after the fact: an indication, no proof."
    )
