"""Memory is counted as an allocator would see it, on tensors that have no content."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from device_memory import GPU, counted, stand_ins

KIB = 256  # float32 numbers


def test_what_lives_at_once_is_counted_and_what_was_there_is_not() -> None:
    layer = nn.Linear(16, 16, device=GPU)
    with torch.no_grad(), counted(layer) as live:
        a = torch.empty(4 * KIB, device=GPU)
        b = a.view(2, -1)[0]  # no storage of its own
        c = torch.cat([a, a])
        del a, c
        assert (live.now, live.peak) == (4 * 1024, 12 * 1024)
        del b
        assert live.now == 0
        layer.weight + 1
    assert live.peak == 12 * 1024


def test_what_a_backward_pass_holds_is_counted() -> None:
    x = torch.empty(KIB, device=GPU, requires_grad=True)
    with counted(nn.Identity()) as live:
        y = x.exp().exp()  # each keeps its result
        assert live.now == 2 * 1024
        (gradient,) = torch.autograd.grad(y.sum(), x)
        del y
    assert gradient.shape == x.shape
    assert live.now == 1024


def test_attention_is_the_fused_kernel_unless_plain_products_are_asked_for() -> None:
    q = torch.empty(1, 1, 64, 8, device=GPU)
    scores = 4 * 64 * 64
    with torch.no_grad(), counted(nn.Identity()) as fused:
        F.scaled_dot_product_attention(q, q, q)
    with torch.no_grad(), counted(nn.Identity()) as plain, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q)
    assert fused.peak < scores < plain.peak


def test_numbers_that_come_to_the_host_take_no_memory_there() -> None:
    with counted(nn.Identity()):
        there = torch.empty(1 << 40, device=GPU)
        assert there.cpu().shape == there.shape
        assert float(there[0]) == 1.0


def test_one_column_stands_for_all() -> None:
    from calib import gptq

    weight, moments = torch.empty(4, 300, device=GPU), torch.empty(300, 300, device=GPU)
    with stand_ins():
        assert gptq.round_columns(weight, moments, torch.empty(4, device=GPU), 4).shape == weight.shape
    assert list(range(3)) == [0, 1, 2]
    assert "range" not in vars(gptq)
