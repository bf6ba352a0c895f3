"""A sampler that corrects its noise draws nearer to the float network, in PyTorch and in an exported step alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import engines
from calib.config import QuantConfig
from calib.correction import Correction
from calib.data import CalibrationSet
from calib.plan import load_plan
from engines import EngineConfig, open_engine
from gaq_export import pipeline
from gaq_export.deploy.session import draw_with_engine, sampling_of
from gaq_export.diffusion import loop, samplers
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.errors import GaqError
from gaq_export.graph.step import make_step
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.make_plan import CalibrationCallbacks
from gaq_export.quantize.noise_correction import measure_correction
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.trajectories import collect
from tests.gaq_export.readback import session

SEEDS = (3, 4)
NOISY = (SamplerSpec(steps=6, eta=1.0), SamplerSpec(name="ddpm", steps=6))
K, SIGMA, BIAS = 0.05, 0.1, 0.02


def _made_up(steps: int, variance: float = 0.01) -> Correction:
    rows = torch.rand(steps, 2, 1, generator=torch.Generator().manual_seed(5)).double()
    return Correction(
        rule="ptqd",
        gain=tuple(tuple(row) for row in (0.9 + 0.1 * rows[:, 0]).tolist()),
        bias=tuple(tuple(row) for row in (0.01 * rows[:, 1]).tolist()),
        shift=tuple(tuple(row) for row in (0.02 * rows[:, 0]).tolist()),
        variance=(variance,) * steps,
        explained=(0.0,) * steps,
    )


@pytest.mark.parametrize("spec", NOISY, ids=lambda spec: spec.name)
@pytest.mark.parametrize("variance", [1e-4, 0.01, 100.0])
def test_the_sampler_adds_as_much_less_noise_as_the_error_brings(spec: SamplerSpec, variance: float) -> None:
    schedule = linear_schedule()
    plain = samplers.table(schedule, spec)
    corrected = samplers.table(schedule, spec, _made_up(spec.steps, variance))
    for before, after in zip(plain, corrected, strict=True):
        brought = (before.direction - before.clean * before.epsilon_to_clean) ** 2 * variance
        assert after.fresh**2 == pytest.approx(max(before.fresh**2 - brought, 0.0))
        assert after.fresh**2 + after.direction**2 == pytest.approx(
            before.fresh**2 + before.direction**2 if before.direction else after.fresh**2
        )


def test_a_sampler_that_subtracts_the_noise_still_does_so_corrected() -> None:
    row = samplers.Coefficients(x_to_clean=1.0, epsilon_to_clean=0.5, keep=1.0, direction=-3.0, fresh=0.5)
    corrected = samplers._corrected(row, _made_up(1, 0.01), 0)
    assert corrected.direction < -3.0  # longer by what the added noise is shorter
    assert corrected.fresh**2 + corrected.direction**2 == pytest.approx(row.fresh**2 + row.direction**2)


def test_without_noise_of_its_own_a_sampler_changes_nothing_but_the_predicted_noise() -> None:
    spec, schedule = SamplerSpec(steps=4), linear_schedule()
    made = _made_up(4)
    for step, (before, after) in enumerate(
        zip(samplers.table(schedule, spec), samplers.table(schedule, spec, made), strict=True)
    ):
        last = step == 3
        wanted = replace(
            before, gain=made.gain[step], bias=made.bias[step], shift=(0.0,) if last else made.shift[step + 1]
        )
        assert after == wanted


class _Wrong(nn.Module):
    """A network whose error is known: k of its noise, a bias, and noise of its own."""

    def __init__(self, network: nn.Module, sigma: float) -> None:
        super().__init__()
        self.network, self.sigma = network, sigma
        self.generator = torch.Generator().manual_seed(9)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        epsilon: Tensor = self.network(x, t)
        return (1 + K) * epsilon + BIAS + self.sigma * torch.randn(x.shape, generator=self.generator)


def _measured(model: LoadedModel, rule: str, sigma: float, spec: SamplerSpec, images: int = 16) -> Correction:
    config = QuantConfig()
    config = replace(config, correction=replace(config.correction, rule=rule, images=images))
    data: CalibrationSet = collect(model, spec, images=images)
    return measure_correction(model.with_sampler(spec), _Wrong(model.network, sigma), data, config)


def test_ptqd_finds_a_known_error(tiny_model: LoadedModel) -> None:
    spec = SamplerSpec(steps=3)
    found = _measured(tiny_model, "ptqd", SIGMA, spec)
    assert [row[0] for row in found.gain] == pytest.approx([1 / (1 + K)] * 3, abs=0.01)
    assert [row[0] for row in found.bias] == pytest.approx([BIAS] * 3, abs=0.02)
    assert found.variance == pytest.approx([(SIGMA / (1 + K)) ** 2] * 3, rel=0.1)
    assert all(0 < share < 1 for share in found.explained)


@pytest.mark.parametrize("rule", ["ptqd", "tac"])
def test_a_corrected_sampler_draws_nearer_to_the_float_network(rule: str, tiny_model: LoadedModel) -> None:
    spec = SamplerSpec(steps=5)
    model = replace(tiny_model, schedule=replace(tiny_model.schedule, clip=None))
    wrong, sampling = _Wrong(model.network, 0.0), model.sampling(spec)
    found = _measured(model, rule, 0.0, spec)
    exact = loop.run(model.network, SEEDS, sampling)
    plain = loop.run(wrong, SEEDS, sampling)
    corrected = loop.run(wrong, SEEDS, replace(sampling, correction=found))
    assert torch.linalg.norm(corrected - exact) < 0.5 * torch.linalg.norm(plain - exact)


@pytest.mark.parametrize("spec", [SamplerSpec(steps=5), SamplerSpec(steps=5, eta=1.0)], ids=["ddim", "noisy"])
def test_an_exported_step_corrects_its_noise_too(spec: SamplerSpec, tiny_model: LoadedModel, tiny_graph) -> None:
    graph, made = tiny_graph(), _made_up(5)
    make_step(graph, tiny_model.schedule, spec, made)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    runtime, x = session(proto), loop.noise(SEEDS, 0, tiny_model.shape).numpy()
    for step in range(5):
        feeds = {"x": x, "step": np.array([step])}
        if "noise" in {port.name for port in runtime.get_inputs()}:
            feeds["noise"] = loop.noise(SEEDS, step + 1, tiny_model.shape).numpy()
        x = runtime.run(["x_next"], feeds)[0]
    expected = loop.run(tiny_model.network, SEEDS, replace(tiny_model.sampling(spec), correction=made))
    found = loop.finish(SEEDS, torch.from_numpy(x), tiny_model.sampling(spec))
    assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_a_correction_of_other_steps_is_an_error() -> None:
    with pytest.raises(GaqError, match=r"The correction has 4 steps, the sampler 6: calibrate again\."):
        samplers.table(linear_schedule(), SamplerSpec(steps=6), _made_up(4))


@pytest.fixture(scope="module")
def corrected_run(tiny_model: LoadedModel, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("corrected") / "run"
    calls: list[tuple[int, int]] = []
    chosen = pipeline.preset("tiny", CalibrationOptions(recipe="ptqd"))
    pipeline.calibrate(
        tiny_model,
        chosen,
        folder=folder,
        sampler=SamplerSpec(steps=4),
        callbacks=CalibrationCallbacks(on_correct=lambda *at: calls.append(at)),
    )
    assert calls == [(i, 4) for i in range(1, 5)]
    return folder


def test_a_plan_keeps_its_correction_and_both_kinds_of_engine_apply_it(
    corrected_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    plan = load_plan(corrected_run / "plan.safetensors")
    assert plan.correction is not None
    assert plan.correction.rule == "ptqd"
    drawn = {}
    for graph in ("step", "eps"):
        for correct in (True, False):
            file = pipeline.build_engine(
                folder=corrected_run,
                out=tmp_path / f"{graph}-{correct}.plan",
                config=EngineConfig(backend="openvino", batch=(2, 2, 2), threads=1),
                graph=graph,
                correct=correct,
                model=tiny_model,
            ).file
            with open_engine(file) as engine:
                sampling = sampling_of(file)
                draw = draw_with_engine(engine, file, sampling)
                drawn[graph, correct] = draw((1, 2), lambda: None)  # with seed 4 a value lies on the edge of a code
    assert torch.allclose(drawn["step", True], drawn["eps", True], atol=0.02)
    assert torch.allclose(drawn["step", False], drawn["eps", False], atol=0.02)
    assert not torch.allclose(drawn["step", True], drawn["step", False], atol=1e-4)
    with pytest.raises(GaqError, match=r"corrects its noise for .* only, not for .*Build with --no-correction"):
        sampling_of(engines.load_engine_file(tmp_path / "eps-True.plan"), SamplerSpec(steps=9))


def test_a_correction_is_of_one_sampler(corrected_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    config = EngineConfig(backend="openvino", threads=1)
    other = {"config": config, "sampler": SamplerSpec(steps=7), "model": tiny_model, "folder": corrected_run}
    with pytest.raises(GaqError, match=r"correction \(ptqd\) was measured for .*, not for .*\(--no-correction\)\."):
        pipeline.build_engine(out=tmp_path / "unet.plan", **other)
    assert list(tmp_path.iterdir()) == []
