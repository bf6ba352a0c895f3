"""What would stop a build is found before a calibration begins; unusual networks go all the way."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from gaq_export.quantize.make_plan import CalibrationCallbacks
from gaq_export.quantize.network_check import check_network
from gaq_export.quantize.presets import CalibrationOptions
from tests.gaq_export.networks import Own, wrapped

TINY = pipeline.preset("tiny")


class IgnoresTime(Own):
    def embed(self, t: Tensor) -> Tensor:
        return torch.zeros(1, 8)


class BatchNormed(Own):
    def change(self) -> None:
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(self.first(h))


class WeightNormed(Own):
    def change(self) -> None:
        parametrizations.weight_norm(self.first)


class Circular(Own):
    def change(self) -> None:
        self.first.padding_mode = "circular"  # of one pixel, as the zeros were


class CalledTwice(Own):
    def middle(self, h: Tensor) -> Tensor:
        return self.first(functional.silu(self.first(h)))


class TwoNames(Own):
    def change(self) -> None:
        self.again = self.first

    def middle(self, h: Tensor) -> Tensor:
        return self.again(functional.silu(self.first(h)))


class OtherName(TwoNames):
    def middle(self, h: Tensor) -> Tensor:
        return self.again(h)


class SharedWeight(Own):
    def change(self) -> None:
        self.pair = nn.Sequential(self.first, nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.pair[2].weight = self.first.weight

    def middle(self, h: Tensor) -> Tensor:
        return self.pair(h)


class Doubled(nn.Conv2d):
    """A convolution whose weight is a property."""

    weight = property(lambda self: self.part * 2)


class ComputedWeight(Own):
    def change(self) -> None:
        self.first.part = nn.Parameter(self.first._parameters.pop("weight") / 2)
        self.first.__class__ = Doubled


KINDS = [
    IgnoresTime,
    BatchNormed,
    WeightNormed,
    Circular,
    CalledTwice,
    TwoNames,
    OtherName,
    SharedWeight,
    ComputedWeight,
]


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_networks_go_all_the_way(kind: type[Own], tmp_path: Path) -> None:
    # Other weights for each, since tests take networks of the same weights for the same.
    model = wrapped(kind(seed=KINDS.index(kind) + 1))
    plan = pipeline.calibrate(model, TINY, folder=tmp_path / "run")
    config = EngineConfig(backend="openvino", threads=1)
    built = pipeline.build_engine(folder=tmp_path / "run", out=tmp_path / "unet.plan", config=config, model=model)
    assert built.parity is not None
    assert ("first" in plan.layers) == (kind is not ComputedWeight)
    assert "second" in plan.layers
    drawn = pipeline.sample(tmp_path / "unet.plan", num=2, compare=True, model=model, out=tmp_path / "samples")
    assert min(drawn.psnr_db) > 20


class Branches(Own):
    def middle(self, h: Tensor) -> Tensor:
        if h.mean() > 0:
            h = h + 1
        return self.first(h)


class FixedBatch(Own):
    def middle(self, h: Tensor) -> Tensor:
        return torch.stack([self.first(row[None])[0] for row in h])


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, padding=1)


class StandardisedWeight(Own):
    def change(self) -> None:
        self.first = Standardised(8, 8, 3, padding=1)


class LogOfTime(Own):
    def embed(self, t: Tensor) -> Tensor:
        return self.time(t.float().log()[:, None])


REFUSED = {
    Branches: r"its code decides by the values of its inputs \(test_network_check\.py, line \d+: if h\.mean\(\) > 0:\)",
    FixedBatch: "The exported graph fixed its batch at 2: the network's code depends on it",
    StandardisedWeight: r"1 of 2 layers compute with another weight than they hold, .* \(first: 'first'\)\. Keep them "
    "float: --keep-float 'first', or keep_float in CalibrationOptions",
    LogOfTime: "NaN or infinite numbers at timestep 0 and not at others: .* logarithm .* --spacing from-1",
}


def unwanted(*_: object) -> None:
    raise AssertionError("work was done before the network was checked")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_engine_could_be_built_of_is_refused_before_any_work(kind: type[Own], tmp_path: Path) -> None:
    callbacks = CalibrationCallbacks(on_collect=unwanted, on_progress=unwanted)
    with pytest.raises(GaqError, match=REFUSED[kind]) as refused:
        pipeline.calibrate(wrapped(kind()), TINY, folder=tmp_path / "run", callbacks=callbacks)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()  # or the corrected call would find another run in its folder


def test_the_advice_of_a_refusal_helps() -> None:
    keep = pipeline.preset("tiny", CalibrationOptions(keep_float=("first",)))
    check_network(wrapped(StandardisedWeight()), keep.config)
    check_network(wrapped(LogOfTime(), sampler=SamplerSpec(steps=4, spacing="from-1")), TINY.config)


class NumpyTime(Own):
    def embed(self, t: Tensor) -> Tensor:
        return self.time(torch.from_numpy(t.numpy() / 1000.0).float()[:, None])


def test_a_network_that_has_no_tables_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_network(wrapped(NumpyTime()), TINY.config)
    assert "An engine of whole steps cannot be built of this network." in caplog.text
    assert "Build with --graph eps." in caplog.text


def test_a_config_that_diffusers_builds_and_cannot_run_is_refused_before_any_work(
    make_tiny_unet: Callable[[], nn.Module], write_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_tiny_folder(make_tiny_unet(), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"downsample_padding": -5}))
    with pytest.raises(
        GaqError, match=r"own forward pass fails for .*: RuntimeError: .*Its config.json or its code has to"
    ):
        pipeline.calibrate(load_model(weights=folder), TINY, folder=tmp_path / "run")


def test_a_diffusers_network_with_broken_numbers_at_a_timestep_is_refused(
    make_tiny_unet: Callable[[], nn.Module],
) -> None:
    unet = make_tiny_unet()
    unet.time_embedding.linear_1.bias.data[0] = 1e38
    unet.time_embedding.linear_2.weight.data[0] = 1e38
    with pytest.raises(GaqError, match="returns NaN or infinite numbers for images of standard normal noise"):
        wrapped(unet, (1, 16, 16))
