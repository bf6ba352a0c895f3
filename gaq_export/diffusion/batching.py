"""Cutting work into batches: seeds into batches of one size, tensors into batches that an engine takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from calib.config import LARGEST_SEED
from gaq_export.diffusion.conditioning import ConditionalNetwork, Conditioning, bind
from gaq_export.diffusion.denoiser import Denoiser
from gaq_export.errors import GaqError

OnProgress = Callable[[int, int], None]  # called with (done, total)
Draw = Callable[[Sequence[int], Callable[[], None]], Tensor]  # images of some seeds; calls back after every step


def check_seeds(seed: int, count: int) -> None:
    """Raise GaqError if the seeds of `count` images from `seed` on are not all whole numbers of 63 bits.

    The noise would repeat: it takes a seed modulo 2^64, and files hold seeds as int64.
    """
    if not 0 <= seed <= LARGEST_SEED - count + 1:
        raise GaqError(
            f"Found the seed {seed} for {count} images; give a whole number from 0 to {LARGEST_SEED - count + 1}."
        )


def draw_in_batches(draw: Draw, seeds: Sequence[int], batch: int, steps: int, on_step: OnProgress) -> Tensor:
    """Draw all images in batches of one size; the last is filled up with copies of its last seed, which are dropped.

    Args:
        draw: draws one image for each seed, and calls back after every step.
        seeds: one per image.
        batch: images at a time.
        steps: how often `draw` calls back for one batch.
        on_step: called with (steps done, steps in all) over all batches.

    Returns:
        The images, (N, C, H, W).
    """
    total = -(-len(seeds) // batch) * steps  # rounded up to whole batches
    done = 0

    def report_step() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    parts = []
    for start in range(0, len(seeds), batch):
        rows = [*seeds[start : start + batch]]
        # Kernels depend on the batch size: in a smaller last batch the same seed could give slightly other pixels.
        padded = rows + rows[-1:] * (batch - len(rows))
        parts.append(draw(padded, report_step)[: len(rows)])
    return torch.cat(parts)


def split_rows(rows: Mapping[str, Tensor], least: int, most: int) -> Iterator[dict[str, Tensor]]:
    """Cut tensors along their first axis, all alike, into batches between `least` and `most`.

    The last batch is filled up to `least` with copies of its last row; drop what is computed for those.
    """
    count = len(next(iter(rows.values())))
    for start in range(0, count, most):
        part = {name: row[start : start + most] for name, row in rows.items()}
        short = least - len(next(iter(part.values())))
        if short > 0:
            # (N, ...) -> (least, ...)
            part = {name: torch.cat((row, row[-1:].expand(short, *row.shape[1:]))) for name, row in part.items()}
        yield part


def bind_in_batches(
    network: ConditionalNetwork,
    conditioning: Conditioning | None,
    seeds: Sequence[int],
    batch: int,
    *,
    apart: bool = False,
) -> Denoiser:
    """Return the network as a denoiser for images of these seeds that runs `batch` of them at a time; see `bind`."""
    # The seed decides an image's condition, so every batch is bound to its own seeds.
    parts = [
        bind(network, conditioning, seeds[start : start + batch], apart=apart) for start in range(0, len(seeds), batch)
    ]

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        rows = zip(parts, torch.split(x, batch), torch.split(t, batch), strict=True)
        return torch.cat([part(images, times) for part, images, times in rows])

    return denoise
