import pytest
import torch

from gaq_export.models.architectures import condition_inputs_of
from gaq_export.models.diffusers_folder import build_network
from gaq_export.models.loader import random_model
from gaq_export.models.registry import MODELS, reduced

SIZES = {
    "ddpm-mnist": 1_112_801,
    "ddpm-mnist-labels": 1_112_801 + 11 * 128,
    "ddpm-cifar10": 35_746_307,
    "ddpm-church": 113_673_219,
    "ldm-celebahq-256": 274_056_163,
    "imagenet-ldm": 400_920_579 + 1001 * 512,
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "dit-xl-2-256": 749_826_464,
}


def test_the_table_knows_the_published_architectures() -> None:
    for name, size in SIZES.items():
        with torch.device("meta"):
            unet = build_network(MODELS[name].config, name)
        assert sum(p.numel() for p in unet.parameters()) == size
    assert MODELS["ddpm-bedroom"].config == MODELS["ddpm-church"].config
    assert all(name == row.name for name, row in MODELS.items())


@pytest.mark.parametrize("name", ["ldm-bedrooms", "imagenet-ldm", "sdxl", "dit-xl-2-256"])
def test_a_known_model_at_reduced_width_has_the_same_kinds_of_blocks(name: str) -> None:
    row = MODELS[name]
    model = random_model(reduced(row))
    assert (model.random_weights, str(model.source), model.shape[1:]) == (True, "module", (16, 16))
    assert sum(p.numel() for p in model.module.parameters()) < 2_000_000
    with torch.device("meta"):
        whole = build_network(row.config, name)
    assert {type(m) for m in model.module.modules()} == {type(m) for m in whole.modules()}
    assert model.condition_inputs.keys() == condition_inputs_of(whole).keys()
    assert (model.spec.sampler, model.spec.guidance) == (row.sampler, row.guidance)
