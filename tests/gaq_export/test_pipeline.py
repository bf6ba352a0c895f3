"""The story: float model, plan, engine, images, through the Python API and real engines."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import engines
from calib.fakequant import fake_quantized
from calib.plan import load_plan
from calib.sqnr import sqnr_db
from engines import EngineConfig, EngineError
from gaq_export import images, pipeline
from gaq_export.deploy import verify
from gaq_export.deploy.parity import Tolerance
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule, timesteps
from gaq_export.errors import GaqError
from gaq_export.quantize.presets import CalibrationOptions
from tests.gaq_export.readback import session

FEW = SamplerSpec(steps=5)
IMPOSSIBLE = dict.fromkeys(("openvino", "ort-cpu"), Tolerance(floor_db=300.0, margin_db=-300.0))


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
        tiny_model, pipeline.preset("tiny"), folder=tiny_run, on_collect=unwanted, on_progress=unwanted
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


def test_an_engine_knows_its_model_its_bits_and_its_layers(tiny_engine, tiny_run: Path, tiny_model) -> None:
    plan = load_plan(tiny_run / "plan.safetensors")
    assert record_of(tiny_engine).provenance.fingerprint == tiny_model.fingerprint
    assert record_of(tiny_engine).bits == "W4A8"
    assert record_of(tiny_engine).plan.layers == len(plan.layers)
    counts = tiny_engine.audit.counts
    weighted = len(plan.layers) + len(plan.float_layers)
    assert sum(counts.values()) == weighted
    assert counts["convolution", "int8"] == sum(q.codes.ndim == 4 for q in plan.layers.values())
    assert tiny_engine.audit.weight_bytes["int4"] == sum((q.codes.numel() + 1) // 2 for q in plan.layers.values())
    assert [p.name for p in tiny_engine.path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_whole_loop_draws_pictures_that_say_how_they_were_made(tiny_engine, tmp_path: Path) -> None:
    steps = []
    drawn = pipeline.sample(
        tiny_engine.path,
        num=3,
        seed=7,
        sampler=FEW,
        out=tmp_path / "s",
        compare=True,
        on_step=lambda *step: steps.append(step),
    )
    assert drawn.images.shape == (3, 1, 16, 16)
    assert drawn.seeds == (7, 8, 9)
    assert not drawn.random_weights
    assert steps == [(who, i + 1, 5) for who in ("engine", "float") for i in range(5)]
    names = {f"{seed:06d}{which}.png" for seed in (7, 8, 9) for which in ("", "-float")}
    assert {p.name for p in (tmp_path / "s").iterdir()} == names | {"grid.png", "samples.json"}
    metadata = images.read_metadata(tmp_path / "s" / "000008.png")
    assert (metadata["seed"], metadata["backend"], metadata["sampler"]["steps"]) == (8, "openvino", 5)
    assert metadata["engine_sha256"] == tiny_engine.sha256
    assert images.read_metadata(tmp_path / "s" / "000008-float.png")["backend"] == "float"
    assert images.read_metadata(drawn.grid)["model"] == "tiny"
    record = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert [entry["seed"] for entry in record["images"]] == [7, 8, 9]
    assert [entry["psnr_db"] for entry in record["images"]] == pytest.approx(drawn.psnr_db, abs=1e-3)
    assert min(drawn.psnr_db) > 10


def test_an_image_depends_on_its_seed_and_not_on_its_company(tiny_engine, tmp_path: Path) -> None:
    def draw(num: int, batch: int, seed: int = 0) -> torch.Tensor:
        return pipeline.sample(
            tiny_engine.path, num=num, batch=batch, seed=seed, sampler=FEW, out=tmp_path / f"{num}-{batch}-{seed}"
        ).images

    whole = draw(6, 4)
    assert torch.equal(draw(6, 4), whole)
    assert torch.equal(draw(2, 4), whole[:2])
    assert torch.equal(draw(2, 4, seed=4), whole[4:])
    # Another batch size may take another kernel, which may round a value the other way.
    assert images.psnr(draw(3, 1), whole[:3]).min() > 30
    assert images.psnr(whole[:3], whole[3:]).max() < 20


def test_an_engine_of_steps_draws_what_one_of_the_network_draws(tiny_step_engine, tiny_engine, tmp_path: Path) -> None:
    spec = SamplerSpec(steps=5, eta=0.5)
    conditioning: list[tuple[str, int, int]] = []
    drawn = pipeline.sample(
        tiny_step_engine.path, num=6, out=tmp_path / "step", on_step=lambda *s: conditioning.append(s)
    )
    plain = pipeline.sample(tiny_engine.path, num=6, sampler=spec, out=tmp_path / "eps")
    assert conditioning == [("engine", i + 1, 10) for i in range(10)]
    assert json.loads((tmp_path / "step" / "samples.json").read_text())["sampler"] == spec.to_json()
    assert images.psnr(drawn.images, plain.images).min() > 30
    assert images.psnr(drawn.images[:3], drawn.images[3:]).max() < 20
    alone = pipeline.sample(tiny_step_engine.path, num=2, seed=4, out=tmp_path / "alone")
    assert torch.equal(alone.images, drawn.images[4:])
    assert record_of(tiny_step_engine).tables
    assert len(tiny_step_engine.audit.kernels) == len(tiny_engine.audit.kernels) - len(
        record_of(tiny_step_engine).tables
    )


def test_an_engine_of_steps_has_one_sampler(tiny_step_engine, tmp_path: Path) -> None:
    with pytest.raises(
        GaqError, match=r"holds the steps of ddim, 5 steps, uniform spacing, eta 0.5; asked for ddim, 5"
    ):
        pipeline.sample(tiny_step_engine.path, num=1, sampler=FEW, out=tmp_path)


def test_fewer_images_than_the_smallest_batch_can_be_drawn(tiny_run: Path, tiny_model, tmp_path: Path) -> None:
    config, out = EngineConfig(backend="onnxruntime", batch=(2, 2, 4), threads=1), tmp_path / "unet.plan"
    built = pipeline.build_engine(folder=tiny_run, out=out, config=config, sampler=FEW, model=tiny_model)
    assert built.parity is not None
    assert built.parity.passed
    assert built.file.backend == "onnxruntime"
    assert built.file.audit.counts["convolution", "int8"] > 0
    drawn = pipeline.sample(tmp_path / "unet.plan", num=1, out=tmp_path / "one")
    assert drawn.images.shape == (1, 1, 16, 16)
    assert drawn.psnr_db is None
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"000000.png", "grid.png", "samples.json"}


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_tensorrt_rtx_runs_every_quantized_layer_in_int8_and_keeps_int4(
    tiny_run: Path, tiny_model, tmp_path: Path
) -> None:
    config = EngineConfig(backend="tensorrt-rtx")
    built = pipeline.build_engine(folder=tiny_run, out=tmp_path / "unet.plan", config=config, model=tiny_model)
    convolutions = sum(q.codes.ndim == 4 for q in built.plan.layers.values())
    assert built.file.audit.counts["convolution", "int8"] == convolutions
    assert built.file.audit.weight_bytes["int4"] > 0
    if engines.find_backend("tensorrt-rtx").can_run() is None:
        assert built.parity is not None
    else:
        assert built.parity is None
        assert built.not_run


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


def test_an_engine_that_fails_its_check_replaces_nothing(
    tiny_run: Path, tiny_model, tiny_engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unet.plan", "unet.plan.json"):
        shutil.copy(tiny_engine.path.with_name(name), tmp_path / name)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(verify, "TOLERANCES", IMPOSSIBLE)
    config = EngineConfig(backend="openvino", threads=1)
    with pytest.raises(GaqError, match=r"The openvino engine differs .* at least 300.0 dB expected. Nothing was"):
        pipeline.build_engine(folder=tiny_run, out=tmp_path / "unet.plan", config=config, model=tiny_model)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_8_bit_weights_are_said_to_overflow_where_they_do(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(tiny_run / "plan.safetensors")
    wide = replace(plan, layers={name: replace(layer, weight_bits=8) for name, layer in plan.layers.items()})
    for overflow, found, words in ((True, wide, "give --wbits 7"), (True, plan, "another"), (False, wide, "another")):
        monkeypatch.setattr(verify, "int8_sums_overflow", lambda overflow=overflow: overflow)
        assert words in verify._advice("openvino", found)
    assert "another" in verify._advice("tensorrt", wide)


def test_what_cannot_be_asked_of_an_engine_is_an_error(tiny_engine, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"Found 0 images to draw.*ask for 1 or more"):
        pipeline.sample(tiny_engine.path, num=0, out=tmp_path / "s")
    with pytest.raises(EngineError, match="Batch 99 lies outside this engine's profile 1 to 16"):
        pipeline.sample(tiny_engine.path, num=99, batch=99, out=tmp_path / "s")
    with pytest.raises(GaqError, match=r"Unknown profile 'x'"):
        pipeline.export_onnx("x", folder=tiny_run)
    assert list(tmp_path.glob("s/*")) == []


def test_export_writes_where_it_is_told(tiny_run: Path, tiny_model, tmp_path: Path) -> None:
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
