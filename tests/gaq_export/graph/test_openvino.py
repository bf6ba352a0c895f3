"""What is rewritten for OpenVINO to merge computes the same as before."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gaq_export.graph.export import export_float
from gaq_export.graph.openvino import rewrite_for_openvino
from tests.gaq_export.readback import session


class _Norms(nn.Module):
    """One norm of images and one of images that were flattened."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.image, self.flat = nn.GroupNorm(groups, 8, eps=1e-3), nn.GroupNorm(groups, 8)
        for norm in (self.image, self.flat):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wide = self.image(x.repeat(1, 8, 1, 1) + torch.arange(8.0).reshape(1, 8, 1, 1))
        out: Tensor = self.flat(wide.flatten(2)).reshape(wide.shape)[:, :1] + 0 * t.reshape(-1, 1, 1, 1)
        return out


class _Attention(nn.Module):
    """From an image to tokens, through attention of two heads, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, 8), nn.Linear(8, 24)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wide = functional.silu(x.repeat(1, 8, 1, 1) * torch.arange(1.0, 9.0).reshape(1, 8, 1, 1))
        tokens = self.norm(wide.flatten(2)).transpose(1, 2)
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return mixed.transpose(1, 2).reshape(wide.shape)[:, :1] + 0 * t.reshape(-1, 1, 1, 1)


def _both(network: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str], Tensor, Tensor]:
    """Return which nodes there were and are, and what the network and its rewritten graph compute."""
    network.eval()
    model = export_float(network, (1, *x.shape[2:]))
    before = Counter(node.op_type for node in model.graph)
    after = Counter(node.op_type for node in rewrite_for_openvino(model).graph)
    t = torch.zeros(len(x), dtype=torch.int64)
    computed = session(ir.to_proto(model)).run(None, {"x": x.numpy(), "t": t.numpy()})[0]
    with torch.no_grad():
        return before, after, network(x, t), torch.from_numpy(computed)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("x", [torch.randn(3, 1, 6, 6), torch.full((3, 1, 6, 6), 2.0), 100 + torch.randn(3, 1, 6, 6)])
def test_norms(groups: int, x: Tensor) -> None:
    torch.manual_seed(0)
    before, after, expected, computed = _both(_Norms(groups), x)
    assert before["GroupNormalization"] == 2
    assert after["GroupNormalization"] == 0
    assert torch.allclose(computed, expected, rtol=1e-2, atol=2e-2 if x.mean() > 50 else 1e-4)


class _Rows(nn.Module):
    """Regroups an image into rows that are not its channels, and cuts a part of a concatenation's part."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wide = x.repeat(1, 8, 1, 1) * torch.arange(1.0, 9.0).reshape(1, 8, 1, 1)
        rows = wide.reshape(-1, 48, 6).transpose(1, 2).reshape(-1, 2, 4, 36)
        joined = torch.cat([rows, rows + 1], 1)[:, 2:3]  # half of its second part
        return joined.reshape(-1, 1, 6, 24)[..., :6] + 0 * t.reshape(-1, 1, 1, 1)


def test_what_only_looks_like_images_and_parts_is_left_alone() -> None:
    *_, expected, computed = _both(_Rows(), torch.randn(3, 1, 6, 6))
    assert torch.equal(computed, expected)


def test_attention_and_silu() -> None:
    """Far from zero SiLU's exponential overflows, and still gives 0 there."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 6, 6)
    x[0, 0, 0] = torch.tensor([-1e3, -100.0, -20.0, 20.0, 100.0, 1e3])
    before, after, expected, computed = _both(_Attention(), x)
    assert before["Sigmoid"] == 1
    assert after["Sigmoid"] == 0
    assert after["Exp"] == 1
    assert torch.allclose(computed, expected, rtol=1e-4, atol=1e-4)
