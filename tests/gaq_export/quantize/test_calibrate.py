"""The whole way from Python: calibrate, build, sample; a model of one's own; the same call again does no work."""

import json
from pathlib import Path

import pytest
import torch

from calib.plan import load_plan
from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from gaq_export.quantize.make_plan import CalibrationCallbacks
from gaq_export.quantize.presets import CalibrationOptions

FEW = SamplerSpec(steps=5)


def unwanted(*_: object) -> None:
    raise AssertionError("work was done that had been done before")


def test_calibration_leaves_a_run_folder_that_says_what_was_done(tiny_run: Path) -> None:
    record = json.loads((tiny_run / "run.json").read_text())
    assert record["settings"]["config"]["weight"]["bits"] == 4
    assert record["settings"]["images"] == 4
    line = record["journal"][0]
    assert line["step"] == "calibrate"
    assert set(line["phase_seconds"]) == {"record", "start", "meta", "fit", "decide", "ranges"}
    assert line["peak_memory_mib"] > 50
    assert {"plan.safetensors", "plan.json", "calibration", "blocks"} <= {p.name for p in tiny_run.iterdir()}


def test_calibrating_again_returns_the_same_plan_without_work(tiny_run: Path, tiny_model) -> None:
    before = (tiny_run / "plan.safetensors").read_bytes()
    plan = pipeline.calibrate(
        tiny_model,
        pipeline.preset("tiny"),
        folder=tiny_run,
        callbacks=CalibrationCallbacks(on_collect=unwanted, on_progress=unwanted),
    )
    again = load_plan(tiny_run / "plan.safetensors")
    assert plan.layers.keys() == again.layers.keys()
    assert torch.equal(plan.scores, again.scores)
    assert (tiny_run / "plan.safetensors").read_bytes() == before


def test_a_run_folder_holds_one_run(tiny_run: Path, tiny_model) -> None:
    with pytest.raises(GaqError, match=r"holds a run with other settings \(config: .*Give --run another folder"):
        pipeline.calibrate(tiny_model, pipeline.preset("tiny", CalibrationOptions(wbits=8)), folder=tiny_run)
    with pytest.raises(GaqError, match=r"holds a run with other settings \(sampler: "):
        pipeline.calibrate(tiny_model, pipeline.preset("tiny"), folder=tiny_run, sampler=FEW)


def test_a_module_of_ones_own_goes_all_the_way(make_foreign, tmp_path: Path) -> None:
    schedule = linear_schedule(num_train=100, beta_end=0.2)
    model = pipeline.wrap(make_foreign(), shape=(1, 8, 8), schedule=schedule, sampler=FEW, name="mine")
    run, out = tmp_path / "run", tmp_path / "mine.plan"
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=run)
    config = EngineConfig(backend="openvino", threads=1)
    with pytest.raises(GaqError, match=r"'mine' is a module of your own: .*model=wrap\(...\)"):
        pipeline.build_engine(folder=run, out=out, config=config)
    built = pipeline.build_engine(folder=run, out=out, config=config, model=model)
    assert built.parity is not None
    assert set(built.plan.layers) == {"down", "gate", "mlp.0", "mlp.2", "shared"}
    drawn = pipeline.sample(out, num=2, compare=True, model=model, out=tmp_path / "samples")
    assert min(drawn.psnr_db) > 20
    with pytest.raises(GaqError, match="is a module of your own"):
        pipeline.sample(out, num=2, compare=True, out=tmp_path / "samples")


def test_python_is_told_of_another_sampler_too_unless_it_names_one(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 100, "beta_end": 0.2, "steps_offset": 1}
    (tiny_folder / "scheduler_config.json").write_text(json.dumps(config))
    model = load_model(weights=tiny_folder)
    assert model.spec.sampler == SamplerSpec(name="dpmpp-2m", steps=49, spacing="from-1")
    for folder, sampler, expected in (("own", None, 1), ("named", FEW, 1)):
        with pytest.raises(KeyboardInterrupt):
            pipeline.calibrate(
                model,
                pipeline.preset("tiny"),
                folder=tmp_path / folder,
                sampler=sampler,
                callbacks=CalibrationCallbacks(on_collect=stop),
            )
        assert caplog.text.count("names PNDMScheduler, which is not among the samplers here; drawn with") == expected


def test_a_sampler_that_the_model_cannot_have_is_refused_before_there_is_a_folder(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="101 sampling steps are more than the 100 timesteps"):
        pipeline.calibrate(tiny_model, pipeline.preset("tiny"), folder=tmp_path / "run", sampler=SamplerSpec(steps=101))
    assert not (tmp_path / "run").exists()
