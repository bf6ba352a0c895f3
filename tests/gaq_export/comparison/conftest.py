"""A tiny comparison of four ways to calibrate, once as it is planned and once with all but its last cell measured."""

from pathlib import Path

import pytest

import calibration
from gaq_export.comparison import runner
from gaq_export.comparison.spec import Comparison, adjusted_preset, claim
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel, wrap

RUNGS = ("rtn", "gptq", "uniform", "gac")


def comparison_of(
    model: LoadedModel, folder: Path, images: int = 2, computed_by: ComputedBy = ComputedBy.PYTORCH
) -> Comparison:
    return Comparison(
        yardstick=Yardstick(model=model, folder=folder, images=images, computed_by=computed_by),
        preset=adjusted_preset("tiny", 3),
        rows={name: calibration.rung(name) for name in RUNGS},
        bits=((4, 8), (4, 4)),
        seeds=(0,),
        workers=1,
        weights_alone=True,
    )


def measure_all_but_one(comparison: Comparison) -> Comparison:
    claim(comparison)
    for job in (runner.PREPARE, *(cell.name for cell in comparison.cells[:-1])):
        runner.work(comparison, job)
    return comparison


@pytest.fixture
def model(make_foreign, tiny_schedule) -> LoadedModel:
    return wrap(make_foreign(), shape=(1, 8, 8), schedule=tiny_schedule, sampler=SamplerSpec(steps=4))


@pytest.fixture
def measured(model: LoadedModel, tmp_path: Path) -> Comparison:
    return measure_all_but_one(comparison_of(model, tmp_path / "bench"))
