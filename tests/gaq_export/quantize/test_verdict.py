"""A network that quantization ruined is noticed: the plan against the float network, on trajectories of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gaq_export import pipeline
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize import verdict
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.verdict import Verdict, judge
from tests.gaq_export.commands import gaq

GOOD = Verdict(plan_sha256="0" * 64, sqnr_db=(30.0, 40.0, 20.0), psnr_db=(30.0, 40.0), costliest={})


class Extremes(nn.Module):
    """The middle layer's input has channels from 1e6 to 1e-8 that count alike: no grid of 8 bits holds them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        self.register_buffer("size", torch.logspace(6, -8, 16).reshape(1, 16, 1, 1))
        with torch.no_grad():
            self.middle.weight /= self.size  # (16, 16, 3, 3) over its input channels

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.middle(self.first(x) * self.size)))
        return out


@pytest.fixture(scope="module")
def ruined(tmp_path_factory) -> tuple[LoadedModel, Path]:
    model = pipeline.wrap(
        Extremes().eval(), shape=(3, 8, 8), schedule=linear_schedule(), sampler=SamplerSpec(steps=4), name="extremes"
    )
    run = tmp_path_factory.mktemp("ruined") / "run"
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=run)
    return model, run


def test_a_ruined_network_is_poor_and_the_layer_is_named(ruined: tuple[LoadedModel, Path]) -> None:
    model, run = ruined

    seen = judge(run, model)

    assert seen.poor
    assert seen.db < verdict.POOR_DB
    assert next(iter(seen.costliest)).endswith("middle")
    assert "Layers that cost most, each quantized alone: " in seen.warning
    assert f"--keep-float {next(iter(seen.costliest))!r}" in seen.warning


def test_a_network_of_eight_bits_is_not_poor(make_foreign, tmp_path: Path) -> None:
    sampler = SamplerSpec(steps=5)
    model = pipeline.wrap(
        make_foreign(), shape=(1, 8, 8), schedule=linear_schedule(num_train=100, beta_end=0.2), sampler=sampler
    )
    pipeline.calibrate(model, pipeline.preset("tiny", CalibrationOptions(wbits=8)), folder=tmp_path / "run")

    seen = judge(tmp_path / "run", model)

    assert seen.db > verdict.POOR_DB
    assert seen.costliest == {}
    assert (len(seen.sqnr_db), len(seen.psnr_db)) == (5, verdict.IMAGES)


def test_it_is_measured_once_for_a_plan(
    ruined: tuple[LoadedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = ruined
    first = judge(run, model)
    monkeypatch.setattr(verdict, "_measure", None)

    assert judge(run) == first  # the module need not be given: nothing is measured


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"plan_sha256": "x"}', '{"sqnr_db": 3}'])
def test_a_damaged_verdict_is_measured_again_and_the_log_says_so(
    ruined: tuple[LoadedModel, Path], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, run = ruined
    first = judge(run, model)
    (run / "verdict.json").write_text(text)

    assert judge(run, model) == first
    assert "verdict.json is damaged, altered or of another version: it is made again." in caplog.text


def test_the_verdict_of_another_plan_does_not_count(ruined: tuple[LoadedModel, Path]) -> None:
    model, run = ruined
    first = judge(run, model)
    record = json.loads((run / "verdict.json").read_text())
    (run / "verdict.json").write_text(json.dumps(record | {"plan_sha256": "0" * 64, "psnr_db": [99.0]}))

    assert judge(run, model) == first


def test_what_counts_is_the_lower_of_noise_and_pictures() -> None:
    assert (GOOD.mean_db, GOOD.db, GOOD.poor) == (30.0, 30.0, False)
    pictures_poor = replace(GOOD, psnr_db=(10.0, 20.0))
    assert (pictures_poor.db, pictures_poor.poor) == (15.0, True)
    assert "20.0 dB at its worst step 2; pictures 35.0 dB PSNR" in GOOD.line


def test_the_commands_print_it_and_scripts_can_require_it(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--weights", home, "--preset", "tiny", "--run", run)

    result = gaq("calibrate", *settings, "--require-db", 199)
    built = gaq("build-engine", "--run", run, "--out", tmp_path / "unet.plan", "--require-db", 199)

    assert "against the float network, on 2 held-out trajectories: predicted noise " in result.stdout
    for one in (result, built):
        assert one.exit_code == 3, one.output
        assert "dB against the float network, 199 dB required (--require-db)." in one.stderr.splitlines()[-1]
    assert (run / "plan.safetensors").exists()  # what was made is kept: the same command without it goes on
    assert not (tmp_path / "unet.plan").exists()
    assert gaq("calibrate", *settings, "--require-db", 1).exit_code == 0


def test_a_poor_plan_is_a_warning_on_the_error_output(home: Path, tmp_path: Path) -> None:
    run = ("--run", tmp_path / "run")
    result = gaq("calibrate", "--weights", home, "--preset", "tiny", "--wbits", 2, "--abits", 2, *run, "-q")

    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ")
    assert "is poor (under 20 dB)" in line
    assert "(--keep-float '" in line
