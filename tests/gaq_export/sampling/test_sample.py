"""Drawing with an engine: the files, images by seed, engines of steps and of the network, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from engines import EngineConfig, EngineError
from gaq_export import images, pipeline
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError

FEW = SamplerSpec(steps=5)


def test_the_whole_loop_draws_images_that_say_how_they_were_made(tiny_engine, tmp_path: Path) -> None:
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


def test_an_image_depends_on_its_seed_and_not_on_the_images_beside_it(tiny_engine, tmp_path: Path) -> None:
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
    calls: list[tuple[str, int, int]] = []
    drawn = pipeline.sample(tiny_step_engine.path, num=6, out=tmp_path / "step", on_step=lambda *s: calls.append(s))
    plain = pipeline.sample(tiny_engine.path, num=6, sampler=spec, out=tmp_path / "eps")
    assert calls == [("engine", i + 1, 10) for i in range(10)]
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
        GaqError, match=r"holds the steps of ddim, 5 steps, uniform spacing, eta 0.5, not those of ddim, 5"
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


def test_what_an_engine_or_a_graph_does_not_have_is_refused(tiny_engine, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"Found 0 images to draw.*ask for 1 or more"):
        pipeline.sample(tiny_engine.path, num=0, out=tmp_path / "s")
    with pytest.raises(EngineError, match="Batch 99 lies outside this engine's profile 1 to 16"):
        pipeline.sample(tiny_engine.path, num=99, batch=99, out=tmp_path / "s")
    with pytest.raises(GaqError, match=r"Unknown profile 'x'"):
        pipeline.export_onnx("x", folder=tiny_run)
    assert list(tmp_path.glob("s/*")) == []
