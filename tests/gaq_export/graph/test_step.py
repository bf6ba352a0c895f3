"""A step graph run S times is the sampler's loop, with everything that depends on t alone in tables."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from calib.fakequant import fake_quantized
from calib.plan import QuantPlan
from gaq_export.deploy import parity
from gaq_export.diffusion import loop
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule, timesteps
from gaq_export.graph.export import export_float
from gaq_export.graph.profiles import PROFILES
from gaq_export.graph.qdq import StepInfo, insert_qdq
from gaq_export.graph.step import FEEDBACK, make_step
from gaq_export.models.loader import LoadedModel, load_model
from tests.gaq_export.readback import Graph, session

SEEDS = [0, 1]
SPECS = [
    SamplerSpec(steps=50),
    SamplerSpec(steps=20, spacing="quad", eta=0.5),
    SamplerSpec(name="ddim-clipped", steps=12),
    SamplerSpec(name="ddpm", steps=20),
    SamplerSpec(name="dpmpp-2m", steps=12),
]


@pytest.fixture(scope="module")
def bundled(exported: Callable[..., ir.Model]) -> tuple[LoadedModel, Callable[[], ir.Model]]:
    """The bundled model, and what gives a fresh copy of its float graph."""
    model = load_model("ddpm-mnist")
    return model, lambda: exported(model.network, model.shape)


def _loop(runtime: onnxruntime.InferenceSession, shape: tuple[int, int, int], steps: int) -> Tensor:
    taken, given = ([v.name for v in values] for values in (runtime.get_inputs(), runtime.get_outputs()))
    x = loop.noise(SEEDS, 0, shape).numpy()
    feeds = {"x": x, "step": np.zeros(1, np.int64), "previous": np.zeros_like(x)}
    for i in range(steps):
        feeds["noise"] = loop.noise(SEEDS, i + 1, shape).numpy()
        out = dict(zip(given, runtime.run(None, {name: feeds[name] for name in taken}), strict=True))
        feeds |= {FEEDBACK[name]: value for name, value in out.items() if name in FEEDBACK}
    assert feeds["step"].tolist() == [steps]
    return torch.from_numpy(feeds["x"]).clamp(-1, 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_step_graph_run_over_and_over_draws_what_the_loop_in_pytorch_draws(spec: SamplerSpec, bundled) -> None:
    model, fresh = bundled
    graph = fresh()
    make_step(graph, model.schedule, spec)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    drawn = _loop(session(proto), model.shape, spec.steps)
    expected = loop.run(model.network, SEEDS, model.sampling(spec))
    assert torch.linalg.norm(drawn - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_inputs_and_outputs_are_only_those_that_the_sampler_needs(bundled) -> None:
    model, fresh = bundled
    names = {}
    for spec in SPECS:
        made = fresh()
        make_step(made, model.schedule, spec)
        graph = made.graph
        names[spec.name, spec.eta > 0] = [v.name for v in graph.inputs][2:], [v.name for v in graph.outputs][3:]
    assert names == {
        ("ddim", False): ([], []),
        ("ddim", True): (["noise"], []),
        ("ddim-clipped", False): ([], []),
        ("ddpm", False): (["noise"], []),
        ("dpmpp-2m", False): (["previous"], ["clean"]),
    }


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("per_step", [False, True])
def test_a_quantized_step_predicts_the_noise_as_closely_as_rounding_allows(
    profile: str, per_step: bool, tiny_graph, tiny_model: LoadedModel, tiny_plan, noisy
) -> None:
    plan, spec = tiny_plan(4, 8, per_step=per_step, symmetric=False), SamplerSpec(steps=8)
    graph, data = tiny_graph(), noisy(16)
    step = make_step(graph, tiny_model.schedule, spec)
    runtime = session(ir.to_proto(insert_qdq(graph, plan, PROFILES[profile], step)))

    def engine(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(runtime.run(["eps"], {"x": x.numpy(), "step": _index(step, t)})[0])

    data = type(data)(x=data.x, t=step.timesteps[data.step % 8], step=data.step % 8)
    fake = fake_quantized(tiny_model.network, plan, float8=PROFILES[profile].float8)
    result = parity.compare(fake, plan.layers, engine, data, parity.TOLERANCES[profile])
    assert result.passed, result


def _index(step: StepInfo, t: Tensor) -> np.ndarray:
    return (step.timesteps == t[0]).nonzero()[:1, 0].numpy()


def test_quantized_layers_that_became_tables_are_not_missed(tiny_graph, tiny_model: LoadedModel, tiny_plan) -> None:
    plan: QuantPlan = tiny_plan(4, 8, convention="tfmq")
    graph = tiny_graph()
    step = make_step(graph, tiny_model.schedule, SamplerSpec(steps=4))
    assert step.baked & plan.layers.keys()
    proto = ir.to_proto(insert_qdq(graph, plan, PROFILES["reference"], step))
    assert {n.layer for n in Graph(proto).quantized()} == plan.layers.keys() - step.baked


class _Counting(nn.Module):
    """Takes the size of the batch from t."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x + 0.01 * t.float().reshape(-1, 1, 1, 1)).reshape(t.shape[0], *x.shape[1:])
        return out


def test_a_batch_that_is_counted_by_t_is_counted_by_x() -> None:
    network, spec, schedule = _Counting().eval(), SamplerSpec(steps=3), linear_schedule()
    graph = export_float(network, (1, 8, 8))
    make_step(graph, schedule, spec)
    expected = loop.run(network, SEEDS, Sampling(schedule=schedule, shape=(1, 8, 8), sampler=spec))
    assert torch.allclose(_loop(session(ir.to_proto(graph)), (1, 8, 8), 3), expected, atol=1e-5)


class _Plain(nn.Module):
    """Adds a function of t to the image, with shapes taken from both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.sin(t.float()[:, None] * torch.arange(1, 5)) * torch.ones(x.shape[0], 1)
        shift = self.first(waves).mean(1)
        out: Tensor = self.last(x + shift.reshape(-1, 1, 1, 1))
        return out


def test_a_foreign_network_becomes_a_step_too() -> None:
    torch.manual_seed(0)
    network, spec, schedule = _Plain().eval(), SamplerSpec(steps=5), linear_schedule()
    graph = export_float(network, (1, 8, 8))
    assert make_step(graph, schedule, spec).baked == {"first"}
    expected = loop.run(network, SEEDS, Sampling(schedule=schedule, shape=(1, 8, 8), sampler=spec))
    assert torch.allclose(_loop(session(ir.to_proto(graph)), (1, 8, 8), 5), expected, atol=1e-5)
    assert timesteps(spec, 1000).tolist() == [800, 600, 400, 200, 0]
