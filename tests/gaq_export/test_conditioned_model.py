"""Every command measures a conditioned model with its conditioning and its guidance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.sqnr import sqnr_db
from engines import EngineConfig, EngineFile
from engines.files import record_path
from gaq_export import pipeline
from gaq_export.comparison import yardstick
from gaq_export.comparison.spec import Comparison, claim
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import bind, class_conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation import evaluate
from gaq_export.evaluation.feature_extractors import find_extractor
from gaq_export.images import to_uint8_tensor
from gaq_export.models.conditioning_request import condition_model
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.quantize import latency, noise_sqnr
from gaq_export.quantize.make_plan import make_plan
from gaq_export.quantize.noise_correction import measure_correction
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.trajectories import collect, image_seed
from gaq_export.report import report, report_page
from gaq_export.report.inspection import InspectionOptions
from gaq_export.run import Run
from tests.gaq_export.diffusion.test_conditioning import SPEC, made
from tests.records import edit_engine_record

CONDITIONING = class_conditioning((0, 4, 7), unconditional=10, guidance=3.0)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return made("classes", CONDITIONING)


@pytest.fixture(scope="module")
def run(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditioned") / "run"
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder)
    return folder


@pytest.fixture(scope="module")
def plan(run: Path) -> QuantPlan:
    return load_plan(run / "plan.safetensors")


@pytest.fixture(scope="module")
def built(run: Path, model: LoadedModel) -> EngineFile:
    config = EngineConfig(backend="openvino", threads=1)
    return pipeline.build_engine(folder=run, out=run / "unet.plan", config=config, model=model).file


def test_the_bundled_model_draws_the_digits_of_its_classes_quantized_too(tmp_path: Path) -> None:
    model, spec = condition_model(load_model("ddpm-mnist-labels")), SamplerSpec(name="ddim-clipped", steps=10)
    assert model.conditioning is not None
    assert (len(model.conditioning.names), model.conditioning.guidance) == (10, 3.0)
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=tmp_path / "run", sampler=spec)
    config = EngineConfig(backend="openvino", threads=1, batch=(1, 10, 10))
    file = pipeline.build_engine(folder=tmp_path / "run", out=tmp_path / "unet.plan", config=config).file
    drawn = pipeline.sample(file.path, num=20, compare=True, out=tmp_path / "samples")
    assert drawn.psnr_db is not None
    assert sorted(drawn.psnr_db)[10] > 25
    read = find_extractor("digits")(to_uint8_tensor(drawn.images)).logits.argmax(1)
    assert int((read == torch.arange(20) % 10).sum()) >= 18


def test_a_page_shows_the_guided_noise(run: Path, plan: QuantPlan, model: LoadedModel) -> None:
    found = noise_sqnr.of_plan(model, plan, 2, lambda what, done, total: None)
    seeds = [image_seed(plan.config.seed, i, "inspection") for i in range(2)]
    start = loop.noise(seeds, 0, model.shape)
    t = torch.full((2,), int(found.t[0]))
    networks = (model.network, fake_quantized(model.network, plan))
    with torch.no_grad():
        exact, other = (bind(network, CONDITIONING, seeds)(start, t) for network in networks)
    wanted = [sqnr_db(a, b) for a, b in zip(exact, other, strict=True)]
    assert found.both[0].tolist() == pytest.approx(wanted, abs=0.01)
    page = pipeline.inspect(folder=run, model=model, images=2).read_text()
    assert "guidance 3" in page
    assert "0, 4, 7" in page


def test_a_report_captions_pictures_with_their_condition(run: Path, built: EngineFile, model: LoadedModel) -> None:
    options = report.ReportOptions(engine=built.path, inspection=InspectionOptions(images=4), rounds=1)
    found = report.measure(run, run / "report.html", options, model=model)
    assert float(yardstick.psnr(found.images.quantized, found.images.exact).min()) > 10
    assert min(found.noise["float trajectory"]) > 5
    page = report_page.render(found)
    for seed, name in enumerate(("0", "4", "7", "0")):
        assert f"seed {seed}, {name}: " in page


@pytest.mark.parametrize("rule", ["ptqd", "tac"])
def test_a_correction_is_of_the_guided_noise(rule: str, plan: QuantPlan, model: LoadedModel) -> None:
    config = replace(plan.config, correction=replace(plan.config.correction, rule=rule, images=5))
    data = collect(model, SPEC, images=6)

    def twice(x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        return 2 * model.network(x, t, conditioning)  # so is the guided noise, whatever the scale

    found = measure_correction(model.with_sampler(SPEC), twice, data, config)
    assert [row[0] for row in found.gain] == pytest.approx([0.5] * SPEC.steps, abs=0.01)


def test_steps_take_the_bits_that_the_guided_noise_needs(model: LoadedModel, tmp_path: Path) -> None:
    config = pipeline.preset("tiny", CalibrationOptions(abits=(4, 8), recipe="pcr")).config
    config = replace(config, activation=replace(config.activation, wide_window=None))
    data = collect(model, SPEC, images=4)
    plan = make_plan(model.with_sampler(SPEC), data, config, tmp_path / "blocks")
    assert plan.step_bits is not None
    assert plan.timesteps is not None
    assert len(plan.timesteps) == SPEC.steps
    assert all(grid.ratio is None or len(grid.ratio) == SPEC.steps for grid in (q.input for q in plan.layers.values()))
    unguided = replace(model, conditioning=replace(CONDITIONING, guidance=1.0))
    other = make_plan(unguided.with_sampler(SPEC), collect(unguided, SPEC, images=4), config, tmp_path / "other")
    assert other.step_bits is not None
    assert other.step_bits.measured_db != plan.step_bits.measured_db


def _with_other_guidance(record: dict[str, Any]) -> None:
    text = json.dumps(record["metadata"])
    assert '"guidance": 3.0' in text
    record["metadata"] = json.loads(text.replace('"guidance": 3.0', '"guidance": 2.0'))


def test_evaluate_compares_engines_of_the_same_conditioning(
    built: EngineFile, model: LoadedModel, tmp_path: Path
) -> None:
    other = tmp_path / "other.plan"
    shutil.copy(built.path, other)
    shutil.copy(record_path(built.path), record_path(other))
    edit_engine_record(other, _with_other_guidance)
    drawing = evaluate.DrawingOptions(num=4, out=tmp_path)
    with pytest.raises(GaqError, match="have different conditioning or guidance"):
        evaluate.evaluate_engines([built.path, other], find_extractor("digits"), drawing, model=model)


def test_a_comparison_draws_with_the_models_conditioning(plan: QuantPlan, model: LoadedModel, tmp_path: Path) -> None:
    y = Yardstick(model=model, folder=tmp_path, images=3)
    yardstick.prepare(y)
    assert max(yardstick.noise_errors(y, model.network)) < 1e-6
    with yardstick.quantized(y, plan) as network:
        assert yardstick.image_scores(y, yardstick.draw_images(y, network))["psnr_db"][0] > 10
        ours, signal = sum(yardstick.noise_errors(y, network)), sum(yardstick.facts(y).signal)
    assert 0 < ours < 0.1 * signal
    chosen = pipeline.preset("tiny")
    bench = Comparison(yardstick=y, preset=chosen, rows={}, bits=((4, 8),), seeds=(0,), workers=1)
    claim(bench)
    other = replace(bench, yardstick=replace(y, model=replace(model, conditioning=replace(CONDITIONING, guidance=2.0))))
    with pytest.raises(GaqError, match=r"holds results with other settings \(conditions\)"):
        claim(other)


def test_a_step_with_guidance_is_timed_as_two_calls(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    layers = ("unet.mid_block.resnets.0.conv1",)
    cache = Run(folder=tmp_path).times
    latency.StepClock(model=model, cache=cache, backend="openvino")(model.network, layers, (4,))
    assert f'"batch": {2 * latency.BATCH}' in cache.read_text()
