"""Random numbers by purpose: the same for the same seed, and none depends on what another purpose drew."""

import torch

from calib.seeds import derive_seed, generator_for


def test_a_purpose_gives_the_same_numbers_whatever_else_was_drawn() -> None:
    expected = torch.rand(4, generator=generator_for(3, "block", "fit"))
    torch.rand(100, generator=generator_for(3, "block", "meta"))
    assert torch.equal(torch.rand(4, generator=generator_for(3, "block", "fit")), expected)
    others = (generator_for(4, "block", "fit"), generator_for(3, "block", "meta"), generator_for(3, "block"))
    assert not any(torch.equal(torch.rand(4, generator=other), expected) for other in others)


def test_derived_seeds_differ_fit_in_63_bits_and_stay_away_from_small_ones() -> None:
    seeds = {derive_seed("image", 0, i) for i in range(1000)}
    assert len(seeds) == 1000
    assert all(1000 < seed < 2**63 for seed in seeds)
