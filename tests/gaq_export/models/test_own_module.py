"""Whatever a module of the caller's is like, it works, or one line says at once what is wrong with it."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gaq_export.errors import GaqError
from tests.gaq_export.networks import Own, wrapped


class InTuple(Own):
    def forward(self, *inputs: Tensor) -> object:
        return (super().forward(*inputs),)


class InObject(Own):
    def forward(self, *inputs: Tensor) -> object:
        return SimpleNamespace(sample=super().forward(*inputs))


class Half(Own):
    def change(self) -> None:
        self.half()


class Bfloat(Own):
    def change(self) -> None:
        self.bfloat16()


@pytest.mark.parametrize("kind", [InTuple, InObject, Half, Bfloat])
def test_the_noise_is_taken_out_of_what_wraps_it_and_weights_become_float32(kind: type[Own]) -> None:
    net = kind()
    dtype = net.leave.weight.dtype
    network = wrapped(net).network
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 50])
    with torch.no_grad():
        found, expected = network(x, t), Own().eval()(x, t)
    assert torch.allclose(found, expected, atol=0 if dtype == torch.float32 else 0.02)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert net.leave.weight.dtype == dtype  # the caller's own stays as it was


class TwoOutputs(Own):
    def forward(self, *inputs: Tensor) -> object:
        out = super().forward(*inputs)
        return out, out


class NoOutput(Own):
    def forward(self, *inputs: Tensor) -> object:
        return None


class WithVariance(Own):
    def forward(self, *inputs: Tensor) -> object:
        return torch.cat([super().forward(*inputs)] * 2, 1)


class WantsFloat(Own):
    def embed(self, t: Tensor) -> Tensor:
        return self.time(t[:, None])


class HalvesTwice(Own):
    def middle(self, h: Tensor) -> Tensor:
        small = self.first(functional.avg_pool2d(functional.avg_pool2d(h, 2), 2))
        return functional.interpolate(small, scale_factor=4)


class Fails(Own):
    def middle(self, h: Tensor) -> Tensor:
        raise LookupError("something went wrong\n  there is no such row.")


class Random(Own):
    def middle(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class BatchStatistics(Own):
    def change(self) -> None:
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(self.first(h))


class FirstTimestep(Own):
    def embed(self, t: Tensor) -> Tensor:
        return super().embed(t[:1])


class Broken(Own):
    def change(self) -> None:
        self.first.weight.data[0, 0] = torch.nan


class Infinite(Own):
    def middle(self, h: Tensor) -> Tensor:
        return h / 0


class TooLarge(Own):
    def change(self) -> None:
        self.double()
        self.first.weight.data[0, 0] = 1e300


REFUSED = {
    TwoOutputs: r"must return the predicted noise, one tensor of the shape of x, \(2, 1, 8, 8\); found a tuple of 2\.",
    NoOutput: "found a NoneType. Wrap it in a module that returns the noise alone",
    WithVariance: r"found \(2, 2, 8, 8\) float32",
    WantsFloat: r"RuntimeError: mat1 and mat2 .* Long and Float\. It runs with t as float32, .* t = t\.float\(\)\.",
    Fails: r"The network's own forward pass fails for x \(2, 1, 8, 8\) and t \(2,\) int64: LookupError: there is no "
    "such row. Give wrap the shape",
    Random: "returns something else each time: it draws random numbers",
    BatchStatistics: r"mixes the images of a batch: .*; a batch norm needs running statistics",
    FirstTimestep: r"mixes the images of a batch: the last comes out otherwise when it is alone\. .* not t\[0\]",
    Broken: "weight 'first.weight' holds NaN or infinite values",
    TooLarge: "weight 'first.weight' holds NaN or infinite values, as float32 at least",
    Infinite: r"returns NaN or infinite numbers for images of standard normal noise at t = \[99, 50\]",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(kind: type[Own]) -> None:
    with pytest.raises(GaqError, match=REFUSED[kind]) as refused:
        wrapped(kind())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("size", "next_size"), [((10, 8), "12 x 8"), ((6, 7), "8 x 8")])
def test_a_size_that_does_not_halve_evenly_is_refused_with_the_next_that_does(
    size: tuple[int, int], next_size: str
) -> None:
    with pytest.raises(GaqError, match=f"It takes images of {next_size}, whose size it can halve evenly"):
        wrapped(HalvesTwice(), (1, *size))


@pytest.mark.parametrize("shape", [(1, 128), (1, 8, 8, 8), (), (1, 0, 8), (1, -8, 8), (1, 8.0, 8), (1, "8", 8)])
def test_a_shape_that_is_no_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        GaqError, match=r"The shape of an image is \(C, H, W\), three whole numbers of 1 or more; found"
    ):
        wrapped(Own(), shape)


def test_an_image_that_fits_in_no_memory_is_refused() -> None:
    with pytest.raises(GaqError, match=r"of shape \(1, 1000000000, 8\) is larger than 1 GiB"):
        wrapped(Own(), (1, 10**9, 8))


def test_a_function_is_no_module() -> None:
    with pytest.raises(GaqError, match=r"must be a torch\.nn\.Module; found function"):
        wrapped(lambda x, t: x)
