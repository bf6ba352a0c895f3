"""What all cells are measured by: float trajectories and images, computed once and the same for every network."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from gaq_export.comparison import runner, yardstick
from gaq_export.comparison.spec import Cell
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet
from gaq_export.images import psnr, to_uint8_tensor
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.make_plan import make_plan
from tests.gaq_export.comparison.conftest import comparison_of


def test_the_float_network_is_exact_by_its_own_yardstick(model: LoadedModel, tmp_path: Path) -> None:
    shared = Yardstick(model=model, folder=tmp_path, images=2, computed_by=ComputedBy.PYTORCH)
    yardstick.prepare(shared)
    signal = yardstick.facts(shared).signal
    assert len(signal) == model.spec.sampler.steps
    errors = yardstick.noise_errors(shared, model.network)
    assert max(errors) < 1e-9 * max(signal)
    double = yardstick.noise_errors(shared, lambda x, t: 2 * model.network(x, t))
    assert double == pytest.approx(signal, rel=1e-5)
    drawn = yardstick.draw_images(shared, model.network)
    assert yardstick.image_scores(shared, drawn)["psnr_db"] == [float("inf")] * 2


def test_what_was_prepared_is_read_and_not_computed_again(model: LoadedModel, tmp_path: Path) -> None:
    shared = Yardstick(model=model, folder=tmp_path, images=2, computed_by=ComputedBy.PYTORCH)
    with pytest.raises(GaqError, match="holds no results yet, or damaged ones: run without --report-only first"):
        yardstick.facts(shared)
    yardstick.prepare(shared)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in stamps} == {"facts.json", "held-out.safetensors", "float-images.safetensors"}
    yardstick.prepare(shared)
    yardstick.noise_errors(shared, model.network)
    yardstick.float_images(shared)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


@pytest.mark.parametrize("name", ["facts.json", "held-out.safetensors", "float-images.safetensors"])
def test_what_was_prepared_and_has_a_flipped_byte_is_computed_again_to_the_same_bytes(
    name: str, model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = Yardstick(model=model, folder=tmp_path, images=2, computed_by=ComputedBy.PYTORCH)
    yardstick.prepare(shared)
    whole = (tmp_path / name).read_bytes()
    place = len(whole) - 9
    (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    yardstick.prepare(shared)
    yardstick.noise_errors(shared, model.network)
    yardstick.float_images(shared)
    assert (tmp_path / name).read_bytes() == whole
    assert f"{name} is damaged, altered or of another version: it is made again." in caplog.text


def test_the_engine_draws_what_pytorch_draws(model: LoadedModel, tmp_path: Path) -> None:
    comparison = comparison_of(model, tmp_path, computed_by=ComputedBy.ENGINE)
    runner.work(comparison, runner.PREPARE)
    data = runner._calibration_set(comparison, 0)
    config = comparison.config(Cell(row="uniform", seed=0, wbits=4))
    plan = make_plan(model, data, runner.at_width(config, 4), tmp_path / "blocks")
    shared = comparison.yardstick
    plain = dataclasses.replace(shared, computed_by=ComputedBy.PYTORCH)
    with yardstick.quantized(shared, plan) as engine, yardstick.quantized(plain, plan) as fake:
        drawn, expected = (yardstick.draw_images(shared, network) for network in (engine, fake))
    unquantized = yardstick.draw_images(shared, model.network)
    assert float(psnr(drawn, expected).min()) > float(psnr(drawn, unquantized).max()) + 10


def test_data_needs_enough_images_and_a_classifier_for_colours(model: LoadedModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(3, np.int64))
    shared = Yardstick(
        model=model, folder=tmp_path, images=2, computed_by=ComputedBy.PYTORCH, data=tmp_path / "few.npz"
    )
    with pytest.raises(GaqError, match="has 3 test images; 2 drawn ones need at least twice as many"):
        yardstick.prepare(shared)
    colour = dataclasses.replace(
        model, spec=dataclasses.replace(model.spec, config={**model.spec.config, "in_channels": 3})
    )
    with pytest.raises(GaqError, match=r"need a trained classifier: give --features resnet56\.th"):
        dataclasses.replace(shared, model=colour)


class _Pixels(torch.nn.Module):
    """A classifier whose features are six pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 2)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :6]


def test_frechet_distances_are_to_real_and_to_float_images(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yardstick, "_classifier", lambda shared: _Pixels())
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "real.npz", images=pixels, labels=np.zeros(40, np.int64))
    shared = Yardstick(
        model=model, folder=tmp_path, images=8, computed_by=ComputedBy.PYTORCH, data=tmp_path / "real.npz"
    )
    yardstick.prepare(shared)
    facts = yardstick.facts(shared).frechet
    assert facts is not None
    assert (facts.classifier, facts.real_images) == ("_Pixels", 32)
    drawn = yardstick.float_images(shared)
    scores = yardstick.image_scores(shared, drawn)
    assert scores["fd_real"] == pytest.approx(facts.drawn["same"].fd_real)
    real = frechet.load_images(tmp_path / "real.npz", "test", model.shape).images
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    features = [
        frechet.moments(frechet.features(_Pixels(), part)) for part in (to_uint8_tensor(drawn), real[order[8:]])
    ]
    assert scores["fd_real"] == pytest.approx(frechet.distance(*features))


def test_facts_of_another_version_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('{"signal": [1.0]}')
    shared = Yardstick(model=model, folder=tmp_path, images=0)
    with pytest.raises(GaqError, match="holds no results yet, or damaged ones: run without --report-only first"):
        yardstick.facts(shared)
