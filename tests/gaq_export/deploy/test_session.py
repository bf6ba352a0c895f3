"""Steps with activation bits of their own: an engine for each width, which take turns in the loop."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import engines
from calib.fakequant import fake_quantized
from calib.plan import StepBits, load_plan, save_plan
from calib.sqnr import sqnr_db
from engines import EngineConfig, open_engine
from gaq_export import pipeline
from gaq_export.deploy import session
from gaq_export.deploy.build import Built
from gaq_export.deploy.parity import PERTURBATION, TOLERANCES, perturbed
from gaq_export.deploy.record import record_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import CalibrationOptions
from tests.records import edit_engine_record

SPEC = SamplerSpec(steps=5, eta=0.5)


@pytest.fixture(scope="module")
def folder(tiny_model: LoadedModel, tmp_path_factory) -> Path:
    """A run of PCR: the last step keeps 8 bits, the others have 6."""
    made: Path = tmp_path_factory.mktemp("turns")
    pipeline.calibrate(
        tiny_model, pipeline.preset("tiny", CalibrationOptions(recipe="pcr", abits=(6, 8))), folder=made, sampler=SPEC
    )
    return made


@pytest.fixture(scope="module")
def built(folder: Path, tiny_model: LoadedModel) -> Built:
    config = EngineConfig(backend="openvino", threads=1)
    return pipeline.build_engine(folder=folder, out=folder / "unet.plan", config=config, model=tiny_model)


def test_every_width_has_its_engine_and_every_step_was_checked(folder: Path, built: Built) -> None:
    assert [file.path.name for file in built.others] == ["unet-a6.plan"]
    assert record_of(built.file).switching.turns == (0, 0, 0, 0, 1)
    assert record_of(built.file).bits == "W4A6/8"
    assert built.parity is not None
    assert built.parity.steps == (0, 1, 2, 3, 4)
    assert built.parity.passed
    assert {p.name for p in folder.glob("*.onnx")} == {"unet.step.a6.openvino.onnx", "unet.step.a8.openvino.onnx"}


def test_the_engines_together_draw_what_the_plan_says(folder: Path, built: Built, tiny_model: LoadedModel) -> None:
    plan, seeds = load_plan(folder / "plan.safetensors"), range(3)
    drawn = pipeline.sample(built.file.path, num=3, out=folder / "samples", model=tiny_model).images
    network = fake_quantized(tiny_model.network, plan)
    expected = loop.run(network, seeds, tiny_model.sampling(SPEC))
    with perturbed(network, plan.layers, PERTURBATION["float32"], seed=0):
        again = loop.run(network, seeds, tiny_model.sampling(SPEC))
    margin = TOLERANCES["openvino"].margin_db
    assert sqnr_db(expected, drawn) > min(20, sqnr_db(expected, again) - margin)  # as every engine is held to
    assert sqnr_db(expected.roll(1, 0), drawn) < 6  # of other seeds
    with session.open_engines(built.file) as both:
        image = np.ones((1, *tiny_model.shape), np.float32)
        for file, steps in ((built.others[0], (0, 3)), (built.file, (4,))):
            with open_engine(file) as alone:
                for step in steps:
                    feeds = {"x": image, "noise": image, "step": np.array([step])}
                    assert np.array_equal(both(feeds)["eps"], alone(feeds)["eps"])


def test_the_rule_of_signal_over_noise_is_measured_and_kept(tiny_model: LoadedModel, tmp_path: Path) -> None:
    plan = pipeline.calibrate(
        tiny_model,
        pipeline.preset("tiny", CalibrationOptions(recipe="rtn", abits=(4, 6, 8))),
        folder=tmp_path,
        sampler=SPEC,
    )
    own = plan.step_bits
    assert own is not None
    assert plan.timesteps is not None
    kept = tiny_model.schedule.alpha_bar[plan.timesteps]
    assert torch.allclose(torch.tensor(own.required_db, dtype=torch.float64), 10 * torch.log10(kept / (1 - kept)))
    for k, bits in enumerate(own.bits):
        enough = [b for b in (4, 6, 8) if own.measured_db[b][k] > own.required_db[k]]
        assert bits == (enough[0] if enough else 8)
    assert len(set(own.bits)) > 1  # or this test would say little


def test_engines_of_different_builds_do_not_take_turns(folder: Path, built: Built, tmp_path: Path) -> None:
    for name in ("unet.plan", "unet.plan.json", "unet-a6.plan", "unet-a6.plan.json"):
        shutil.copy(folder / name, tmp_path / name)
    switching = {"sha256": "0" * 64}
    edit_engine_record(
        tmp_path / "unet.plan", lambda record: record["metadata"]["switching"]["engines"][0].update(switching)
    )
    with pytest.raises(GaqError, match=r"are of different builds: run build-engine again"):
        session.open_engines(engines.load_engine_file(tmp_path / "unet.plan"))


def test_where_few_bits_are_enough_at_every_step_there_is_one_engine_of_those(
    folder: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    plan = load_plan(folder / "plan.safetensors")
    save_plan(replace(plan, step_bits=StepBits(bits=(6,) * 5)), tmp_path / "plan.safetensors")
    config = EngineConfig(backend="openvino", threads=1)
    built = pipeline.build_engine(folder=tmp_path, out=tmp_path / "unet.plan", config=config, model=tiny_model)
    assert built.others == ()
    assert record_of(built.file).switching is None
    assert record_of(built.file).bits == "W4A6"
    assert {p.name for p in tmp_path.glob("*.onnx")} == {"unet.step.a6.openvino.onnx"}


def test_a_graph_that_does_not_know_steps_is_refused(folder: Path, tiny_model: LoadedModel) -> None:
    with pytest.raises(GaqError, match=r"--graph eps does not know steps; use step"):
        pipeline.build_engine(folder=folder, graph="eps", model=tiny_model)


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_on_tensorrt_rtx_both_multiply_int8_by_int8(folder: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    config = EngineConfig(backend="tensorrt-rtx", targets=("sm89",))
    built = pipeline.build_engine(folder=folder, out=tmp_path / "rtx.plan", config=config, model=tiny_model)
    for file in (built.file, *built.others):
        counts = file.audit.counts
        layers = load_plan(folder / "plan.safetensors").layers.keys() - set(record_of(file).tables)
        assert sum(n for (_, precision), n in counts.items() if precision == "int8") == len(layers) > 0
