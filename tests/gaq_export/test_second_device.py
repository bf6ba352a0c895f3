"""Drawing, judging, inspecting and comparing with a network on a second device: a tensor that stays behind raises."""

from pathlib import Path

import pytest
import torch

from gaq_export import pipeline
from gaq_export.comparison import yardstick
from gaq_export.comparison.yardstick import ComputedBy, Yardstick
from gaq_export.devices import Device
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.calibrate import calibrate
from gaq_export.quantize.presets import CalibrationOptions, preset, with_images
from gaq_export.quantize.verdict import judge
from gaq_export.sampling.sample import _draw_with_float
from tests.gaq_export.networks import Own, wrapped
from tests.second_device import second_device


@pytest.mark.parametrize("recipe", ["ptqd", "tcaq"])
def test_a_run_on_a_second_device_is_calibrated_and_judged_there(recipe: str, tmp_path: Path) -> None:
    chosen = preset("tiny", CalibrationOptions(recipe=recipe, omega="uniform", iterations=0, wbits=4))
    chosen = with_images(chosen, 4, None)
    host = wrapped(Own())
    with second_device() as place:
        model = host.on(Device(place=place))
        plan = calibrate(model, chosen, folder=tmp_path)
        verdict = judge(tmp_path, model)
        noise = noise_sqnr.of_plan(model, plan, 2, lambda what, done, total: None)
        drawn = _draw_with_float(model, host.sampling())(range(2), lambda: None)
    assert len(verdict.sqnr_db) == 4
    assert noise
    assert torch.allclose(drawn, _draw_with_float(host, host.sampling())(range(2), lambda: None), atol=1e-5)


def test_a_plan_of_a_second_device_is_inspected_and_measured_there_and_on_the_host(tmp_path: Path) -> None:
    chosen = preset("tiny", CalibrationOptions(omega="uniform", iterations=0, wbits=4))
    host = wrapped(Own())
    errors = []
    with second_device() as place:
        moved = host.on(Device(place=place))
        plan = calibrate(moved, with_images(chosen, 4, None), folder=tmp_path)
        for model, folder in ((moved, tmp_path / "there"), (host, tmp_path / "here")):
            folder.mkdir()
            assert pipeline.inspect(folder=tmp_path, model=model, images=2, out=folder / "page.html").is_file()
            shared = Yardstick(model=model, folder=folder, images=2, computed_by=ComputedBy.PYTORCH)
            yardstick.prepare(shared)
            with yardstick.quantized(shared, plan) as network:
                errors.append(yardstick.noise_errors(shared, network))
                drawn = yardstick.draw_images(shared, network)
            assert len(yardstick.image_scores(shared, drawn)["psnr_db"]) == 2
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
