"""Batches: every image is drawn once, in batches of one size, and rows come back in order."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gaq_export.diffusion.batching import bind_in_batches, draw_in_batches, split_rows
from gaq_export.diffusion.conditioning import bind, class_conditioning


def test_images_are_drawn_in_batches_of_one_size_and_come_back_in_order() -> None:
    sizes, steps = [], []

    def draw(seeds: Sequence[int], on_step: Callable[[], None]) -> Tensor:
        sizes.append(len(seeds))
        on_step()
        on_step()
        return torch.tensor(seeds, dtype=torch.float32).reshape(-1, 1, 1, 1)

    images = draw_in_batches(draw, range(10, 17), 3, 2, lambda done, total: steps.append((done, total)))
    assert sizes == [3, 3, 3]
    assert images.flatten().tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert steps == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize(("count", "sizes"), [(1, [2]), (2, [2]), (5, [5]), (6, [5, 2]), (10, [5, 5])])
def test_rows_are_cut_between_the_least_and_the_most_and_the_last_row_fills_up(count: int, sizes: list[int]) -> None:
    rows = {"x": torch.arange(count * 2).reshape(count, 2), "t": torch.arange(count)}
    parts = list(split_rows(rows, 2, 5))
    assert [len(part["t"]) for part in parts] == sizes
    assert all(len(part["x"]) == len(part["t"]) for part in parts)
    assert torch.equal(torch.cat([part["x"] for part in parts])[:count], rows["x"])
    assert set(torch.cat([part["t"] for part in parts])[count:].tolist()) <= {count - 1}


def test_a_network_bound_in_batches_predicts_what_it_predicts_at_once() -> None:
    called = []

    def network(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        called.append(len(x))
        return x * cond["class_labels"].reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)

    conditioning, seeds = class_conditioning((3, 5, 8)), range(5)
    x, t = torch.randn(5, 1, 2, 2), torch.full((5,), 7)
    together = bind(network, conditioning, seeds)(x, t)
    called.clear()
    assert torch.equal(bind_in_batches(network, conditioning, seeds, 2)(x, t), together)
    assert called == [2, 2, 1]
