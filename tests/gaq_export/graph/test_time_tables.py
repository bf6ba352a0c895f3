"""What depends on the timestep alone becomes tables with the right numbers, and what cannot is refused."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.errors import GaqError
from gaq_export.graph import files
from gaq_export.graph.export import export_float
from gaq_export.graph.step import make_step
from gaq_export.graph.time_tables import dependencies, make_time_tables
from gaq_export.models.loader import LoadedModel, load_model

GRAPH = """<ir_version: 10, opset_import: ["": 21]>
net (float[batch, 2] x, int64[batch] t) => (float[batch, 2] eps)
    <float[2] rates = {0.5, 2.0}, int64[2] column = {-1, 1}>
{
    real = Cast <to = 1> (t)
    tall = Reshape(real, column)
    waves = Mul(tall, rates)
    embedding = Sin(waves)
    size = Shape(x)
    zero = Sub(x, x)
    moved = OP(zero, embedding)
    eps = Add(x, moved)
}"""


def _graph(op: str = "Add") -> ir.Model:
    """Return eps = x + sin(t * rates), joined by `op`."""
    return ir.from_proto(onnx.parser.parse_model(GRAPH.replace("OP", op)))


def test_each_value_knows_the_inputs_that_it_depends_on() -> None:
    model = _graph()
    by_name = {value.name: {on.name for on in inputs} for value, inputs in dependencies(model.graph).items()}
    assert by_name["embedding"] == {"t"}
    assert by_name["zero"] == {"x"}
    assert by_name["eps"] == {"x", "t"}
    assert by_name["size"] == set()  # known before the graph runs


def test_a_table_has_the_value_at_each_step_and_the_graph_looks_it_up() -> None:
    model, steps = _graph(), torch.tensor([700, 40, 0])
    assert make_time_tables(model, steps) == frozenset()  # no layer with weights is gone
    assert [value.name for value in model.graph.inputs] == ["x", "step"]
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for i, t in enumerate(steps.tolist()):
        (eps,) = evaluator.run(None, {"x": x, "step": np.array([i])})
        np.testing.assert_allclose(eps, x + np.sin(t * np.array([0.5, 2.0])), atol=1e-6)


def test_an_operator_that_does_not_broadcast_a_row_is_refused() -> None:
    with pytest.raises(GaqError, match=r"uses 'embedding', .* in MatMul; only Add, Sub, Mul, Div can"):
        make_time_tables(_graph("MatMul"), torch.tensor([700, 40, 0]))


@pytest.fixture(scope="module")
def bundled(exported: Callable[..., ir.Model]) -> tuple[LoadedModel, Callable[[], ir.Model]]:
    """The bundled model, and what gives a fresh copy of its float graph."""
    model = load_model("ddpm-mnist")
    return model, lambda: exported(model.network, model.shape)


def test_the_layers_of_the_time_embedding_are_gone_and_their_tables_have_a_row_for_each_step(bundled) -> None:
    model, fresh = bundled
    made = fresh()
    graph = made.graph
    before = {node.name for node in graph if node.op_type == "Gemm"}
    step = make_step(made, model.schedule, SamplerSpec(steps=7))
    assert len(before) == len(step.baked) == 13
    assert {name for name in step.baked if "time_emb_proj" not in name} == {
        "unet.time_embedding.linear_1",
        "unet.time_embedding.linear_2",
    }
    assert not [node for node in graph if node.op_type in ("Gemm", "Sin", "Cos")]
    weights = {name.removesuffix(".weight") for name in graph.initializers if name.endswith(".weight")}
    assert not weights & step.baked
    tables = [v for name, v in graph.initializers.items() if name.startswith("temporal.")]
    assert len(tables) == 11
    assert {v.shape[0] for v in tables} == {7}


def test_weights_that_lie_beside_the_graph_give_the_same_tables(bundled, tmp_path, monkeypatch) -> None:
    model, fresh = bundled
    monkeypatch.setattr(files, "EXTERNAL_BYTES", 1000)
    files.save_onnx(fresh(), tmp_path / "float.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    tables = []
    for made in (fresh(), ir.load(tmp_path / "float.onnx")):
        make_step(made, model.schedule, SamplerSpec(steps=7))
        values = {name: v.const_value for name, v in made.graph.initializers.items() if name.startswith("temporal.")}
        tables.append({name: value.numpy() for name, value in values.items() if value is not None})
    assert tables[0].keys() == tables[1].keys()
    assert all(np.array_equal(table, tables[1][name]) for name, table in tables[0].items())


class _Odd(nn.Module):
    """Uses t where no table can follow: joined to the image as a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        plane = (t.float() / 100)[:, None, None, None].expand(x.shape[0], 1, x.shape[2], x.shape[3])
        out: Tensor = self.layer(torch.cat([x, plane], 1))
        return out


def test_a_network_that_uses_t_in_another_way_is_refused_with_the_way_out(tiny_model: LoadedModel) -> None:
    graph = export_float(_Odd().eval(), (1, 8, 8))
    with pytest.raises(GaqError, match=r"in Concat; only Add, Sub, Mul, Div can .*--graph eps"):
        make_step(graph, linear_schedule(), SamplerSpec(steps=3))


def test_a_timestep_without_a_value_is_refused_before_it_is_in_a_table() -> None:
    model = ir.from_proto(onnx.parser.parse_model(GRAPH.replace("OP", "Add").replace("Sin(waves)", "Log(waves)")))
    with pytest.raises(GaqError, match=r"NaN or infinite numbers from timestep 0 alone; .* --spacing from-1"):
        make_time_tables(model, torch.tensor([50, 0]))
    make_time_tables(_graph(), torch.tensor([50, 1]))
