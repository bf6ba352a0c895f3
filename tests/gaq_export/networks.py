"""Networks of a caller's own, for tests: one that works, and whose parts a test replaces in a class of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.models.loader import LoadedModel, wrap


class Own(nn.Module):
    """A small residual network with an embedding of the timestep, seeded.

    Args:
        channels: of an image.
        seed: of the weights.
    """

    WIDTH = 8

    def __init__(self, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Conv2d(channels, self.WIDTH, 3, padding=1)
            self.time = nn.Linear(1, self.WIDTH)
            self.first = nn.Conv2d(self.WIDTH, self.WIDTH, 3, padding=1)
            self.second = nn.Conv2d(self.WIDTH, self.WIDTH, 3, padding=1)
            self.leave = nn.Conv2d(self.WIDTH, channels, 3, padding=1)
            self.change()

    def change(self) -> None:
        """Change the layers, once they are there."""

    def embed(self, t: Tensor) -> Tensor:
        """Return an embedding (N, WIDTH) of timesteps (N,)."""
        return self.time(t.float()[:, None] / 1000)

    def middle(self, h: Tensor) -> Tensor:
        """Return (N, WIDTH, H, W) for as much."""
        return self.first(h)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> object:
        h = functional.silu(self.enter(x) + self.embed(t)[:, :, None, None])
        return self.leave(self.second(h + functional.silu(self.middle(h))))


def wrapped(net: nn.Module, shape: tuple[int, ...] = (1, 8, 8), sampler: SamplerSpec | None = None) -> LoadedModel:
    """Return a network as a model, drawn in four steps unless a sampler is given."""
    schedule = linear_schedule(num_train=100, beta_end=0.2)
    return wrap(net, shape=shape, schedule=schedule, sampler=sampler or SamplerSpec(steps=4))
