"""The exported graph computes what the network does, says which module made a node, and is the same everywhere."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gaq_export.errors import GaqError
from gaq_export.graph.export import OPSET, export_float, export_submodel, in_attention, module_of
from tests.gaq_export.readback import session


class _Net(nn.Module):
    """Masked attention over the rows of an image, and a concatenation whose parts are cut out again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4, bias=False)
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rows = self.mix(x) * cond["scale"].reshape(-1, 1, 1, 1)
        seen = torch.ones(4, 4, dtype=torch.bool).tril()
        mixed = functional.scaled_dot_product_attention(rows, x, rows, attn_mask=seen)
        joined = torch.cat([mixed, x], 1)
        out: Tensor = self.last(torch.cat([joined[:, 1:], joined[:, :1]], 1)) + 0 * t.reshape(-1, 1, 1, 1)
        return out


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return _Net().eval()


@pytest.fixture(scope="module")
def model(network: nn.Module) -> ir.Model:
    return export_float(network, (1, 4, 4), {"scale": torch.ones(1)})


def test_any_batch_computes_what_the_network_computes(network: nn.Module, model: ir.Model) -> None:
    assert model.opset_imports[""] == OPSET
    assert [value.name for value in model.graph.inputs] == ["x", "t", "scale"]
    runtime = session(ir.to_proto(model))
    for batch in (1, 3):
        x, t, scale = torch.randn(batch, 1, 4, 4), torch.zeros(batch, dtype=torch.int64), torch.rand(batch)
        (eps,) = runtime.run(["eps"], {"x": x.numpy(), "t": t.numpy(), "scale": scale.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(eps), network(x, t, {"scale": scale}))


def test_nodes_say_which_module_made_them_and_not_where_its_source_is(model: ir.Model) -> None:
    modules = {node.op_type: module_of(node) for node in model.graph if node.op_type in ("Conv", "Softmax")}
    assert modules["Conv"] == "last"
    assert "mix" in {module_of(node) for node in model.graph if node.op_type == "MatMul"}
    assert not any("stack_trace" in key for node in model.graph for key in node.metadata_props)


def test_attention_is_two_products_around_a_softmax(model: ir.Model) -> None:
    inside = Counter(node.op_type for node in model.graph if in_attention(node))
    assert (inside["MatMul"], inside["Softmax"]) == (2, 1)
    assert inside["Reshape"] == 0
    (keys,) = (node for node in model.graph if node.op_type == "Transpose" and in_attention(node))
    assert list(keys.attributes["perm"].as_ints()) == [0, 1, 3, 2]


def test_parts_of_a_concatenation_are_not_cut_out_of_it(model: ir.Model) -> None:
    assert [node for node in model.graph if node.op_type == "Slice"] == []


class _Two(nn.Module):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.float() + 1, ids.float().sum(1)


def test_a_submodel_has_its_own_input_and_outputs() -> None:
    model = export_submodel(_Two().eval(), "ids", torch.zeros(1, 5, dtype=torch.int64), ["hidden", "pooled"])
    ids = torch.arange(15).reshape(3, 5)
    hidden, pooled = session(ir.to_proto(model)).run(["hidden", "pooled"], {"ids": ids.numpy()})
    assert hidden.tolist() == (ids + 1).tolist()
    assert pooled.tolist() == ids.sum(1).tolist()


class _Causal(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return out + 0 * t.reshape(-1, 1, 1, 1)


def test_what_cannot_be_exported_is_an_error_of_one_line() -> None:
    with pytest.raises(GaqError, match=r"^torch cannot export this network to ONNX: [^\n]+$"):
        export_float(_Causal().eval(), (1, 4, 4))
