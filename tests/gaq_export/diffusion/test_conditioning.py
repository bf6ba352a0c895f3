"""Conditioning: the same whoever draws, guidance as published, and the same in every engine."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import engines
from calib.calibrate import calibrate
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import load_plan
from calib.sqnr import sqnr_db
from engines import EngineConfig
from gaq_export import pipeline
from gaq_export.deploy import step_loop
from gaq_export.deploy.parity import TOLERANCES, compare
from gaq_export.deploy.record import record_of
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import Conditioning, bind, class_conditioning
from gaq_export.diffusion.denoiser import engine_denoiser
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.errors import GaqError
from gaq_export.graph.files import save_onnx
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.graph.step import make_step
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel, wrap
from gaq_export.models.provenance import load_conditioning
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.trajectories import collect, image_seed
from gaq_export.sampling import shards, workers
from tests.calib.conditional import NETWORKS, short

SPEC = SamplerSpec(steps=4)


def made(kind: str, conditioning: Conditioning | None) -> LoadedModel:
    schedule = linear_schedule(num_train=100)
    return wrap(
        NETWORKS[kind][0](), shape=(1, 8, 8), schedule=schedule, sampler=SPEC, name=kind, conditioning=conditioning
    )


def texts(guidance: float) -> Conditioning:
    rows = torch.randn(3, 77, 12, generator=torch.Generator().manual_seed(5))
    return Conditioning(
        names=("a cat", "a dog", "a tree"),
        rows={"encoder_hidden_states": rows},
        unconditional={"encoder_hidden_states": torch.zeros(1, 77, 12)},
        guidance=guidance,
    )


def test_an_images_condition_depends_on_its_seed() -> None:
    conditioning = class_conditioning((3, 5, 8))
    assert conditioning.of((0, 1, 2, 3))["class_labels"].tolist() == [3, 5, 8, 3]
    assert conditioning.name_of(4) == "5"
    guided = class_conditioning((3, 5, 8), unconditional=10, guidance=3.0)
    assert guided.of((7, 2))["class_labels"].tolist() == [10, 10, 5, 8]
    assert len({conditioning.sha256, guided.sha256, class_conditioning((3, 8, 5)).sha256}) == 3
    with pytest.raises(
        GaqError, match=r"Guidance of 2 needs the unconditional condition for each of \[.class_labels.\]"
    ):
        class_conditioning((1,), guidance=2.0)
    with pytest.raises(GaqError, match=r"a row of every input for each of 2 names; found \{'class_labels': 3\}"):
        Conditioning(names=("a", "b"), rows={"class_labels": torch.zeros(3)}, unconditional={})


def test_an_incomplete_record_is_refused(tmp_path: Path) -> None:
    record = class_conditioning((1, 2), unconditional=10).to_json()
    assert Conditioning.from_json(record, tmp_path).names == ("1", "2")
    for name in ("names", "guidance", "file"):
        with pytest.raises(CalibError, match=rf"The record of the conditioning: {name} is missing"):
            Conditioning.from_json({part: value for part, value in record.items() if part != name}, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": []},
        {"names": "12"},
        {"names": ["1"]},
        {"guidance": "x"},
        {"guidance": math.nan},
        {"guidance": 2.0, "unconditional": {}},
        {"file": "../x.safetensors"},
        {"file": "/etc/hostname"},
        {"file": "missing.safetensors"},
        {"file": 3},
        {"rows": {}},
        {"rows": {"class_labels": [1, [2]]}},
        {"rows": {"class_labels": [-1, 2]}},
        {"rows": {"class_labels": [1, 10**40]}},
        {"rows": {"class_labels": [0.5, 2]}},
        {"rows": None},
    ],
)
def test_a_record_of_another_form_is_one_line(changes: dict[str, object], tmp_path: Path) -> None:
    record = class_conditioning((1, 2), unconditional=10).to_json()
    with pytest.raises((CalibError, GaqError)) as error:
        Conditioning.from_json(record | changes, tmp_path)
    assert "\n" not in str(error.value)


def test_a_flipped_byte_in_text_states_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    made = Conditioning(names=("a",), rows={"states": torch.ones(1, 2)}, unconditional={"states": torch.zeros(1, 2)})
    record = made.to_json()
    made.save(tmp_path)
    file = tmp_path / str(made.file)
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((CalibError, GaqError)):
            Conditioning.from_json(record, tmp_path)


def test_guidance_leads_away_from_the_unconditional_noise() -> None:
    model = made("classes", None)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([40, 40])
    conditioning = class_conditioning((1, 2), unconditional=10, guidance=2.5)
    with torch.no_grad():
        found = bind(model.network, conditioning, (0, 1))(x, t)
        unconditional = model.network(x, t, {"class_labels": torch.tensor([10, 10])})
        something = model.network(x, t, {"class_labels": torch.tensor([1, 2])})
        plain = bind(model.network, class_conditioning((1, 2)), (0, 1))(x, t)
    torch.testing.assert_close(found, unconditional + 2.5 * (something - unconditional))
    assert torch.equal(plain, something)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_calibration_set_is_what_the_network_is_called_with(guidance: float, tmp_path: Path) -> None:
    model = made("text", texts(guidance))
    seen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    handle = model.network.register_forward_pre_hook(lambda module, args: seen.append(args))
    data = collect(model, SPEC, images=4, folder=tmp_path, by_engine=False)
    handle.remove()
    for place, rows in enumerate((data.x, data.t, data.cond["encoder_hidden_states"])):
        called = [args[place] if place < 2 else args[2]["encoder_hidden_states"] for args in seen]
        assert torch.equal(rows, torch.cat(called))
    assert data.step.tolist() == [step for step in range(4) for _ in range(4 if guidance == 1 else 8)]
    again = collect(model, SPEC, images=4, folder=tmp_path)  # kept
    assert torch.equal(again.x, data.x)
    other = collect(replace(model, conditioning=texts(5.0)), SPEC, images=4, folder=tmp_path, by_engine=False)
    assert not torch.equal(other.x, data.x[-len(other.x) :])


@pytest.mark.parametrize(
    ("kind", "backend"), [("classes", "onnxruntime"), ("text", "openvino"), ("transformer", "openvino")]
)
def test_engines_take_the_condition_too(
    kind: str, backend: str, exported: Callable[..., ir.Model], tmp_path: Path
) -> None:
    conditioning = texts(3.0) if kind == "text" else class_conditioning((0, 4, 7), unconditional=9, guidance=3.0)
    model = made(kind, conditioning)
    data = collect(model, SPEC, images=4)
    plan = calibrate(model.network, data, short(), timesteps=100)
    graph = exported(model.network, model.shape, {name: row[:1] for name, row in conditioning.rows.items()})
    assert [value.name for value in graph.graph.inputs] == ["x", "t", *conditioning.rows]
    save_onnx(insert_qdq(graph, plan, find_profile(engines.find_backend(backend).profile)), tmp_path / "unet.onnx")
    settings = EngineConfig(backend=backend, threads=1, optimisation="basic")
    file = engines.build(tmp_path / "unet.onnx", tmp_path / "unet.plan", settings, {})
    with engines.open_engine(file) as engine, torch.no_grad():
        profile = engines.find_backend(backend).profile
        found = compare(
            fake_quantized(model.network, plan),
            plan.layers,
            engine_denoiser(engine),
            data,
            TOLERANCES[profile],
            steps=2,
        )
        assert found.passed
        seeds = [image_seed(0, i, "fresh") for i in range(2)]
        drawn, exact = (
            loop.run(network, seeds, model.sampling(SPEC))
            for network in (engine_denoiser(engine), fake_quantized(model.network, plan))
        )
    assert sqnr_db(exact, drawn) > 20


def test_guidance_runs_inside_the_engine_and_its_scale_is_an_input(
    exported: Callable[..., ir.Model], tmp_path: Path
) -> None:
    model = made("classes", None)
    conditioning = class_conditioning((0, 4, 7), unconditional=10, guidance=3.0)
    graph = exported(model.network, model.shape, {name: row[:1] for name, row in conditioning.rows.items()})
    spec, proto = SamplerSpec(steps=4, eta=0.5), ir.to_proto(graph)
    info = make_step(graph, model.schedule, spec, guided=True)
    assert info.baked == {"unet.time_embedding.linear_1", "unet.time_embedding.linear_2"}
    save_onnx(graph, tmp_path / "unet.onnx")
    settings = EngineConfig(backend="onnxruntime", threads=1, optimisation="basic")
    file = engines.build(tmp_path / "unet.onnx", tmp_path / "unet.plan", settings, {})
    assert [s.name for s in file.inputs] == [
        "x",
        "step",
        "class_labels",
        "unconditional_class_labels",
        "guidance",
        "noise",
    ]
    with engines.open_engine(file) as engine:
        for scale, seeds in ((3.0, range(4)), (1.5, range(2, 5))):
            asked = replace(conditioning, guidance=scale)
            drawn = step_loop.run(engine, seeds, replace(model, conditioning=asked).sampling(spec))
            exact = loop.run(model.network, seeds, replace(model, conditioning=asked).sampling(spec))
            torch.testing.assert_close(drawn, exact, atol=1e-4, rtol=0)
        feeds = {name: value.numpy() for name, value in conditioning.feeds(range(2)).items()}
        feeds |= {"x": loop.noise((0, 1), 0, model.shape).numpy(), "noise": np.ones((2, *model.shape), np.float32)}
        alone = [engine(feeds | {"step": np.array([i])})["x_next"][row] for row, i in enumerate((3, 1))]
    rows = ir.from_proto(proto)
    make_step(rows, model.schedule, spec, guided=True, step_per_image=True)
    save_onnx(rows, tmp_path / "rows.onnx")
    file = engines.build(tmp_path / "rows.onnx", tmp_path / "rows.plan", settings, {})
    with engines.open_engine(file) as engine:  # each image at a step of its own, with a scale of its own
        own = {"step": np.array([3, 1]), "guidance": np.array([3.0, 3.0], np.float32)}
        np.testing.assert_allclose(engine(feeds | own)["x_next"], alone, atol=1e-4)
        torch.testing.assert_close(
            step_loop.run(engine, seeds, replace(model, conditioning=asked).sampling(spec)),
            drawn,
            atol=1e-4,
            rtol=0,
        )
    assert not torch.allclose(
        drawn[:2],
        loop.run(model.network, seeds, replace(model, conditioning=conditioning).sampling(spec))[:2],
        atol=1e-3,
    )


def test_a_conditioned_model_goes_all_the_way(tmp_path: Path) -> None:
    conditioning = class_conditioning((0, 4, 7), unconditional=10, guidance=3.0)
    model, run = made("classes", conditioning), tmp_path / "run"
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=run)
    settings = EngineConfig(backend="openvino", threads=1)
    for graph in ("step", "eps"):
        built = pipeline.build_engine(
            folder=run, out=tmp_path / f"{graph}.plan", config=settings, graph=graph, model=model
        )
        assert built.parity is not None
        assert built.parity.passed
        assert load_conditioning(record_of(built.file).provenance, tmp_path).sha256 == conditioning.sha256
        drawn = pipeline.sample(built.file.path, num=3, out=tmp_path / graph, compare=True, model=model)
        assert drawn.psnr_db is not None
        assert min(drawn.psnr_db) > 10


def test_texts_lie_beside_the_plan_and_the_engine(tmp_path: Path) -> None:
    conditioning = texts(3.0)
    model, run, home = made("text", conditioning), tmp_path / "run", tmp_path / "engine"
    pipeline.calibrate(model, pipeline.preset("tiny", CalibrationOptions(recipe="rtn")), folder=run)
    assert "rows" not in load_plan(run / "plan.safetensors").provenance["conditioning"]
    settings = EngineConfig(backend="openvino", threads=1)
    home.mkdir()
    file = pipeline.build_engine(folder=run, out=home / "unet.plan", config=settings, model=model).file
    shutil.rmtree(run)
    drawn = pipeline.sample(file.path, num=4, out=tmp_path / "samples", compare=True, model=model)
    assert drawn.psnr_db is not None
    assert min(drawn.psnr_db) > 10
    made_of = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [row["file"] for row in made_of["images"]][2:] == ["000002-a-tree.png", "000003-a-cat.png"]
    assert made_of["images"][3]["condition"] == "a cat"
    only_dogs = replace(
        conditioning, names=("a dog",), rows={name: row[1:2] for name, row in conditioning.rows.items()}
    )
    streamed = pipeline.sample_shards(
        file.path, num=4, shard=2, workers=2, conditioning=only_dogs, out=tmp_path / "shards", batch=2
    )
    assert streamed.drawn == 4
    dog = next(shards.read_shards(tmp_path / "shards"))[0][1]
    assert float(psnr(dog[None].float() / 127.5 - 1, drawn.images[1:2])[0]) > 40
    assert home / conditioning.file in workers.files_of(file)
    (home / conditioning.file).write_bytes(b"")
    with pytest.raises(CalibError, match="conditioning-"):
        pipeline.sample(file.path, num=1, out=tmp_path / "samples", model=model)
