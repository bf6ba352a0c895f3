"""The closed form of the surrogate gradient, against plain double backward in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from calib.blocks import BlockIO
from calib.config import OmegaConfig
from calib.omega import align, batch_weights, initial_scores, softmax_gradient, surrogate_gradient

N, P, K = 7, 5, 3


def _problem() -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    train = torch.randn(N, P, generator=g, dtype=torch.float64)
    groups = [torch.randn(4, P, generator=g, dtype=torch.float64) for _ in range(K)]
    logits = torch.randn(P, generator=g, dtype=torch.float64)
    omega = torch.softmax(torch.randn(N, generator=g, dtype=torch.float64), 0)
    return logits, train, groups, omega


def _loss(logits: Tensor, x: Tensor) -> Tensor:
    """Smooth and not quadratic, so that Hessians differ from group to group."""
    return ((x * torch.sigmoid(logits)).sum(-1).tanh() - x.sum(-1)).square()


def _outer_objective(omega: Tensor, logits: Tensor, train: Tensor, groups: list[Tensor], eta: float) -> Tensor:
    """mean_k L_k - 2 / (K (K - 1)) sum_{t<k} G_t . G_k, written out as the paper has it."""
    v = logits.clone().requires_grad_()
    inner = torch.autograd.grad((omega * _loss(v, train)).sum(), v, create_graph=True)[0]
    ahead = logits - eta * inner
    losses = [_loss(ahead, x).mean() for x in groups]
    g = [torch.autograd.grad(one, omega, create_graph=True)[0] for one in losses]
    pairs = [g[a] @ g[b] for a in range(len(g)) for b in range(a + 1, len(g))]
    return torch.stack(losses).mean() - 2 / (len(g) * (len(g) - 1)) * torch.stack(pairs).sum()


@pytest.mark.parametrize("inner_step", [1e-2, 0.3, 3.0])
def test_the_closed_form_equals_double_backward(inner_step: float) -> None:
    logits, train, groups, omega = _problem()
    v = logits.clone().requires_grad_()
    gradient = torch.autograd.grad((omega * _loss(v, train)).sum(), v)[0]
    eta = inner_step / gradient.square().mean().sqrt().item()
    free = omega.clone().requires_grad_()
    expected = torch.autograd.grad(_outer_objective(free, logits, train, groups, eta), free)[0]
    found = surrogate_gradient(
        lambda p: _loss(p[0], train),
        [lambda p, x=x: _loss(p[0], x).mean() for x in groups],
        [logits],
        omega,
        inner_step,
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_the_outer_gradient_agrees_with_finite_differences() -> None:
    logits, train, groups, omega = _problem()
    free = omega.clone().requires_grad_()
    exact = torch.autograd.grad(_outer_objective(free, logits, train, groups, 0.5), free)[0]
    for i in range(N):
        shift = torch.zeros_like(omega)
        shift[i] = 1e-6
        up, down = (_outer_objective((omega + s).requires_grad_(), logits, train, groups, 0.5) for s in (shift, -shift))
        assert torch.isclose((up - down) / 2e-6, exact[i], rtol=1e-5, atol=1e-9)


def test_the_softmax_gradient_is_the_jacobian_of_softmax() -> None:
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    gradient = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    omega = torch.softmax(scores / 0.5, 0)
    expected = torch.autograd.grad((omega * gradient).sum(), scores)[0]
    assert torch.allclose(softmax_gradient(omega.detach(), gradient, 0.5), expected)


def test_equal_scores_weigh_every_sample_alike() -> None:
    index = torch.tensor([3, 1, 8, 0])
    assert torch.equal(batch_weights(initial_scores(10, 32), index, 1.0), torch.full((4,), 0.25))


def test_a_sample_that_helps_validation_gains_weight_and_a_harmful_one_loses_it() -> None:
    """Two kinds of training samples pull a logit apart; validation sides with the first kind."""

    def loss(logits: Sequence[Tensor], io: BlockIO, index: Tensor) -> Tensor:
        return (logits[0].sum() - io.target[index, 0]).square()

    train = _recording(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]).repeat(4, 1))
    held_out = _recording(torch.full((10, 1), 1.0))
    config = OmegaConfig(
        groups=2, meta_steps=40, meta_learning_rate=0.05, inner_step=0.01, batch=16, validation_batch=4
    )
    scores = align(
        loss,
        [torch.zeros(1)],
        train,
        held_out,
        torch.arange(10) % 2,
        initial_scores(16, 16),
        config,
        torch.Generator().manual_seed(0),
    )
    assert scores[train.target[:, 0] > 0].min() > scores[train.target[:, 0] < 0].max()


def _recording(target: Tensor) -> BlockIO:
    _, spec = torch.utils._pytree.tree_flatten(((), {}))
    return BlockIO(inputs=(), spec=spec, target=target)


def test_samples_that_cancel_leave_the_weights_as_they_are() -> None:
    def samples(logits: Sequence[Tensor]) -> Tensor:
        return logits[0] * torch.tensor([1.0, -1.0])

    omega = torch.tensor([0.5, 0.5])
    assert surrogate_gradient(samples, [lambda p: p[0].sum()] * 2, [torch.zeros(1)], omega, 0.1).tolist() == [0, 0]
