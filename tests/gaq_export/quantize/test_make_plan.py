"""A second round calibrates on what the network of the first draws, and on nothing else."""

from dataclasses import replace
from pathlib import Path

import torch

from calib.calibrate import calibrate
from calib.fakequant import fake_quantized
from gaq_export import pipeline
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.make_plan import make_plan
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.trajectories import collect


def test_rounds(tiny_model: LoadedModel, tmp_path: Path) -> None:
    spec, chosen = SamplerSpec(steps=4), pipeline.preset("tiny", CalibrationOptions(recipe="adaround"))
    data = collect(tiny_model, spec, images=chosen.images)
    both = make_plan(tiny_model.with_sampler(spec), data, replace(chosen.config, rounds=2), tmp_path / "blocks")
    first = calibrate(tiny_model.network, data, replace(chosen.config, rounds=2), timesteps=100)
    drawn = collect(replace(tiny_model, module=fake_quantized(tiny_model.network, first)), spec, images=chosen.images)
    assert torch.equal(drawn.x[: chosen.images], data.x[: chosen.images])  # the same noise at the first step
    assert not torch.equal(drawn.x, data.x)
    second = calibrate(tiny_model.network, drawn, replace(chosen.config, rounds=2), timesteps=100)
    for name, layer in both.layers.items():
        assert torch.equal(layer.codes, second.layers[name].codes)
        assert layer.input == second.layers[name].input
    assert {path.name for path in tmp_path.iterdir()} == {"blocks", "blocks-round-2"}
