"""Layers that read one tensor, as q, k and v of an attention do, have one grid, whatever rule it comes from."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.data import CalibrationSet
from calib.plan import QuantPlan
from calib.trace import group_by_input, trace
from gaq_export.models.architectures import EpsilonModel

STEP = torch.arange(3).repeat_interleave(4)
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ema": ({}, {}),
    "minmax": ({"rule": "minmax", "narrower": (4,)}, {}),
    "of each step": ({"per_step": True}, {}),
    "network": ({"per_step": True, "sizes": "network"}, {}),
    "qdrop": ({}, {"activations": "qdrop"}),
    "lsq": ({}, {"activations": "lsq", "activation_iterations": 2}),
}


def plan_of(network: nn.Module, rule: str, channels: int, **cond: Tensor) -> QuantPlan:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(12, channels, 8, 8, generator=drawn)
    data = CalibrationSet(x=x, t=90 - 20 * STEP, step=STEP, cond=cond)
    activation, reconstruction = RULES[rule]
    config = QuantConfig(
        weight=WeightConfig(candidates=2),
        activation=ActivationConfig(batch=4, **activation),
        reconstruction=ReconstructionConfig(iterations=2, batch=4, activation_learning_rate=1e-4, **reconstruction),
        omega=OmegaConfig(rule="uniform"),
        micro_batch=4,
    )
    return calibrate(network, data, config, timesteps=100)


@pytest.mark.parametrize("rule", RULES)
def test_q_k_and_v_share_their_grid(rule: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    states = torch.randn(12, 5, 12, generator=torch.Generator().manual_seed(3))
    plan = plan_of(EpsilonModel(unet.eval()), rule, 1, encoder_hidden_states=states)
    assert not plan.products  # float unless a convention asks
    attentions = {name.rpartition(".")[0] for name in plan.layers if name.endswith("to_q")}
    assert len(attentions) == 4
    grids = {name: (layer.input, *layer.narrower) for name, layer in plan.layers.items()}
    for attention in attentions:
        q, k, v = (grids[f"{attention}.to_{letter}"] for letter in "qkv")
        assert k == v
        assert (q == k) == attention.endswith("attn1")  # the other reads the text
    assert len({grids[f"{attention}.to_k"] for attention in attentions}) == 3  # the text is one, whoever reads it


class Odd(nn.Module):
    """An attention that is no block, because it is handed a dictionary: q, k and v are blocks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, named: dict[str, Tensor]) -> Tensor:
        tokens = named["tokens"]
        return functional.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens * 2))


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Conv2d(4, 4, 1), Odd(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x) * (1 + t.reshape(-1, 1, 1, 1) / 100)
        tokens = h.flatten(2).mT  # (N, C, H, W) -> (N, H*W, C)
        out: Tensor = self.leave(self.attention({"tokens": tokens}).mT.reshape(h.shape))
        return out


@pytest.mark.parametrize("rule", ["qdrop", "lsq"])
def test_they_share_it_even_where_each_is_a_block_of_its_own(rule: str) -> None:
    torch.manual_seed(0)
    network = Foreign().eval()
    assert group_by_input(trace(network, (4, 8, 8), 100), ["attention.q", "attention.k", "attention.v"]) == [
        ("attention.q", "attention.k"),
        ("attention.v",),
    ]
    plan = plan_of(network, rule, 4)
    assert [block.name for block in plan.blocks] == ["attention.q", "attention.k", "attention.v"]
    q, k, v = (plan.layers[f"attention.{name}"].input for name in "qkv")
    assert q == k
    assert v != k
