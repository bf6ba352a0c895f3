"""Images that are no pictures are drawn to arrays; what needs pictures says so before it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.errors import GaqError
from gaq_export.evaluation.evaluate import DrawingOptions
from gaq_export.evaluation.feature_extractors import find_extractor
from gaq_export.models.loader import LoadedModel
from tests.gaq_export.networks import Own, wrapped

REFUSED = r"draws 4 channels, and pictures have 1 or 3"


@pytest.fixture(scope="module")
def rgba() -> LoadedModel:
    return wrapped(Own(channels=4), (4, 8, 8))


@pytest.fixture(scope="module")
def run(rgba: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("rgba")
    pipeline.calibrate(rgba, pipeline.preset("tiny"), folder=folder)
    return folder


@pytest.fixture(scope="module")
def engine(rgba: LoadedModel, run: Path) -> EngineFile:
    config = EngineConfig(backend="openvino", threads=1)
    return pipeline.build_engine(folder=run, out=run / "unet.plan", config=config, model=rgba).file


def test_other_channels_than_a_pictures_are_drawn_to_arrays(
    engine: EngineFile, rgba: LoadedModel, tmp_path: Path
) -> None:
    drawn = pipeline.sample(engine.path, num=3, seed=7, compare=True, model=rgba, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "samples.json"]
    assert (drawn.grid, drawn.arrays) == (None, tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz") as arrays:
        assert arrays["seeds"].tolist() == [7, 8, 9]
        assert arrays["images"].shape == arrays["float"].shape == (3, 4, 8, 8)
        assert np.array_equal(arrays["images"], drawn.images.numpy())
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["arrays"] == "images.npz"
    assert [row["seed"] for row in record["images"]] == [7, 8, 9]
    assert [row["psnr_db"] for row in record["images"]] == pytest.approx(drawn.psnr_db, abs=1e-3)


def test_the_command_says_where_the_arrays_are_and_why(engine: EngineFile, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sample", "--engine", str(engine.path), "-n", "2", "--out", str(tmp_path), "-q"])
    assert done.exit_code == 0
    assert "images.npz" in done.output
    assert "They have 4 channels, which no PNG holds: `images` in that file." in done.output


def test_what_needs_pictures_refuses_at_the_start(
    engine: EngineFile, rgba: LoadedModel, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(GaqError, match=REFUSED):
        pipeline.sample_shards(engine.path, num=4, shard=2, out=tmp_path / "shards")
    drawing = DrawingOptions(num=4, out=tmp_path / "evaluated")
    with pytest.raises(GaqError, match=REFUSED):
        pipeline.evaluate_engines([engine.path], find_extractor("digits"), drawing, model=rgba)
    with pytest.raises(GaqError, match=REFUSED):
        pipeline.write_report(folder=run, out=tmp_path / "report.html", model=rgba)
    with pytest.raises(GaqError, match=rf"{REFUSED}: compare without pictures \(--images 0\)"):
        Yardstick(model=rgba, folder=tmp_path, images=4)
    assert list(tmp_path.iterdir()) == []
