"""What is quantized, what stays float and why, in networks of several kinds."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from calib.config import QuantConfig
from calib.errors import CalibError
from calib.float_layers import float_reasons, require_batch_first
from calib.trace import trace
from gaq_export.models.architectures import EpsilonModel


def test_a_foreign_network_is_taken_by_structure_and_says_what_stays_float(make_foreign) -> None:
    traced = trace(make_foreign(), (1, 8, 8), 100)
    reasons = float_reasons(traced, "deploy")
    assert reasons == {
        "enter": "first layer",
        "leave": "last layer",
        "time.0": "depends on the step alone (temporal table)",
        "time.2": "depends on the step alone (temporal table)",
        "up": "ConvTranspose2d has no quantized form here",
        "attention.out_proj": "its weight is used without calling it as a module",
    }


def test_the_tfmq_convention_keeps_shortcuts_and_down_sampling_and_quantizes_embeddings(tiny_unet: UNet2DModel) -> None:
    traced = trace(EpsilonModel(tiny_unet), (1, 16, 16), 100)
    reasons = float_reasons(traced, "tfmq")
    names = {n.removeprefix("unet.") for n in reasons}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= names
    assert "time_embedding.linear_2" not in names
    assert all("shortcut" in n or "downsampl" in n for n in names - {"conv_in", "conv_out", "time_embedding.linear_1"})


def test_layers_that_match_a_pattern_stay_float(make_foreign) -> None:
    traced = trace(make_foreign(), (1, 8, 8), 100)
    assert float_reasons(traced, "deploy", ("mlp.*",))["mlp.0"] == "asked for by 'mlp.*'"
    with pytest.raises(CalibError, match=r"'nothing\*' matches no layer"):
        float_reasons(traced, "deploy", ("nothing*",))
    with pytest.raises(CalibError, match="No layer is left to quantize"):
        float_reasons(traced, "deploy", ("*",))
    with pytest.raises(CalibError, match=r"Unknown convention 'x'. Choose one of \['deploy', 'tfmq'\]"):
        QuantConfig(convention="x")


class Rows(nn.Module):
    """A network with a layer that reads every row of an image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rows, self.leave = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = self.enter(x).flatten(0, 2)  # (N, C, H, W) -> (N * C * H, W)
        out: Tensor = self.leave(self.rows(rows).reshape(x.shape)) * (1 + t.reshape(-1, 1, 1, 1) / 100)
        return out


def test_a_layer_whose_rows_are_not_samples_cannot_have_ranges_of_each_step() -> None:
    traced = trace(Rows(), (1, 4, 4), 100)
    require_batch_first(traced, ["enter", "leave"])
    with pytest.raises(CalibError, match="Layer 'rows' is called with an input whose first axis is not the batch"):
        require_batch_first(traced, ["enter", "rows"])


def test_a_layer_that_reads_the_step_alone_is_float_in_engines_and_quantized_by_the_paper() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.enter, self.middle, self.leave = (nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.second(self.first(t[:, None].float().expand(-1, 4)))  # (N,) -> (N, 4)
            out: Tensor = self.leave(self.middle(self.enter(x) + h[:, None, None]))
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        traced = trace(Timed(), (1, 4, 4), 100)
    assert set(float_reasons(traced, "deploy")) == {"first", "second", "enter", "leave"}
    assert set(float_reasons(traced, "tfmq")) == {"first", "enter", "leave"}
