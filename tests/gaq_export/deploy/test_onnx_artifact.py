"""The exported graph: where it is written, and what its time tables hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from calib.fakequant import fake_quantized
from calib.sqnr import sqnr_db
from gaq_export import pipeline
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.quantize.presets import CalibrationOptions
from tests.gaq_export.readback import session


def test_the_graph_is_written_to_the_path_that_is_asked_for(tiny_run: Path, tiny_model, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "unet.onnx"
    made = pipeline.export_onnx("reference", folder=tiny_run, model=tiny_model, out=out)
    assert made.path == out
    assert out.stat().st_size > 10_000
    assert len(made.tables) == 10
    assert not list(tiny_run.glob("unet.*.reference.onnx"))


def test_tables_hold_the_rounded_embedding_where_the_plan_rounds_it(tiny_model, noisy, tmp_path: Path) -> None:
    folder, spec = tmp_path / "run", SamplerSpec(steps=4)
    plan = pipeline.calibrate(
        tiny_model, pipeline.preset("tiny", CalibrationOptions(convention="tfmq")), folder=folder, sampler=spec
    )
    made = pipeline.export_onnx("reference", folder=folder, model=tiny_model, out=tmp_path / "step.onnx")
    exact = {name: layer for name, layer in plan.layers.items() if name not in made.tables}
    assert exact.keys() < plan.layers.keys()
    visited, x = timesteps(spec, tiny_model.schedule.num_train), noisy(16).x
    runtime = session(onnx.load(made.path))
    won = []
    for step, t in enumerate(visited):
        found = torch.from_numpy(runtime.run(["eps"], {"x": x.numpy(), "step": np.array([step])})[0])
        near = []
        for layers in (plan.layers, exact):
            with torch.no_grad():
                fake = fake_quantized(tiny_model.network, replace(plan, layers=layers))
                near.append(sqnr_db(fake(x, t.expand(len(x))), found))
        won.append(near[0] - near[1])
    assert min(won) > 0
    assert sum(won) / len(won) > 3
