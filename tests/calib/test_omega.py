"""The closed forms of every rung of the ladder, against plain double backward in float64; and what the weights do."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from calib import omega
from calib.blocks import BlockIO
from calib.config import OmegaConfig
from calib.omega import Recordings, align_scores, initial_scores, score_gradient, weighting

N, P, K = 7, 5, 3
Problem = tuple[Tensor, Tensor, list[Tensor], Tensor]


def problem() -> Problem:
    """Return logits (P,), training samples (N, P), K validation groups and weights (N,), all in float64."""
    g = torch.Generator().manual_seed(0)
    train = torch.randn(N, P, generator=g, dtype=torch.float64)
    groups = [torch.randn(4, P, generator=g, dtype=torch.float64) for _ in range(K)]
    logits = torch.randn(P, generator=g, dtype=torch.float64)
    return logits, train, groups, torch.softmax(torch.randn(N, generator=g, dtype=torch.float64), 0)


def loss(logits: Tensor, x: Tensor) -> Tensor:
    """Smooth and not quadratic, so that Hessians differ from group to group."""
    return ((x * torch.sigmoid(logits)).sum(-1).tanh() - x.sum(-1)).square()


def objective(rule: str, weights: Tensor, eta: float) -> Tensor:
    """Write out mean_k L_k - 2 / (K (K - 1)) sum_{t<k} G_t . G_k as the paper has it, with the rule's G."""
    logits, train, groups, _ = problem()
    v = logits.requires_grad_()
    inner = torch.autograd.grad((weights * loss(v, train)).sum(), v, create_graph=True)[0]
    ahead = logits.detach() - eta * inner
    losses = [loss(ahead, x).mean() for x in groups]
    mean = torch.stack(losses).mean()
    if rule == "mse":
        return mean
    what = weights if rule == "gac" else ahead
    g = [torch.autograd.grad(one, what, create_graph=True)[0] for one in losses]
    pairs = [g[a] @ g[b] for a in range(K) for b in range(a + 1, K)]
    return mean - 2 / (K * (K - 1)) * torch.stack(pairs).sum()


def closed_form(rule: str, eta: float) -> Tensor:
    logits, train, groups, weights = problem()
    jacobian = torch.autograd.functional.jacobian(lambda v: loss(v, train), logits)
    return omega.RULES[rule](jacobian, eta, logits, [lambda p, x=x: loss(p, x).mean() for x in groups], weights)


@pytest.mark.parametrize("eta", [1e-2, 0.3, 3.0])
@pytest.mark.parametrize("rule", ["mse", "gac", "gac-exact"])
def test_the_closed_form_equals_double_backward(rule: str, eta: float) -> None:
    free = problem()[3].requires_grad_()
    expected = torch.autograd.grad(objective(rule, free, eta), free)[0]
    assert torch.allclose(closed_form(rule, eta), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rule", ["mse", "gac", "gac-exact"])
def test_the_closed_form_agrees_with_finite_differences(rule: str) -> None:
    weights, closed = problem()[3], closed_form(rule, 0.5)
    for i in range(N):
        shift = torch.zeros_like(weights)
        shift[i] = 1e-6
        up, down = (objective(rule, (weights + s).requires_grad_(), 0.5) for s in (shift, -shift))
        assert torch.isclose((up - down) / 2e-6, closed[i], rtol=1e-5, atol=1e-9)


def test_fish_averaged_over_task_orders_leans_the_way_gradient_matching_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """To first order in its step, fish less mse is a multiple of gac less mse (Shi et al. 2021, theorem 3.1)."""
    logits, train, groups, weights = problem()
    jacobian = torch.autograd.functional.jacobian(lambda v: loss(v, train), logits)
    eta, step = 0.3, 1e-4

    def path(order: Sequence[int]) -> Tensor:
        """A plain step, not scaled to the gradient's size as `fish` does, so that the theorem's terms stand alone."""
        at, total = weights.clone(), torch.zeros_like(weights)
        for k in order:
            gradient = omega.mse(jacobian, eta, logits, [lambda p, x=groups[k]: loss(p, x).mean()], at)
            at, total = at - step * gradient, total + gradient
        return total / K

    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    lean = torch.stack([path(o) for o in orders]).mean(0) - closed_form("mse", eta)
    expected = closed_form("gac", eta) - closed_form("mse", eta)
    assert torch.nn.functional.cosine_similarity(lean, expected, dim=0) > 0.999
    monkeypatch.setattr(omega, "FISH_STEP", 1e-7)
    assert torch.allclose(closed_form("fish", eta), closed_form("mse", eta), rtol=1e-4)


@pytest.mark.parametrize("softmax", ["batch", "set"])
def test_the_score_gradient_is_the_jacobian_of_the_softmax(softmax: str) -> None:
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(9, dtype=torch.float64, generator=g, requires_grad=True)
    index, config = torch.tensor([7, 2, 4]), OmegaConfig(temperature=0.5, softmax=softmax)
    gradient = torch.randn(3, dtype=torch.float64, generator=g)
    if softmax == "batch":
        weights = torch.softmax(scores[index] / 0.5, 0)
    else:
        weights = torch.softmax(scores / 0.5, 0)[index] * 9 / 3
    assert torch.allclose(weighting(scores, config)(index).double(), weights, atol=1e-6)
    expected = torch.autograd.grad((weights * gradient).sum(), scores)[0][index]
    assert torch.allclose(score_gradient(weights.detach(), gradient, config, 9), expected)


@pytest.mark.parametrize("rule", ["uniform", "mse", "gac", "gac-exact", "fish"])
@pytest.mark.parametrize("softmax", ["batch", "set"])
def test_equal_scores_weigh_every_sample_alike(rule: str, softmax: str) -> None:
    config = OmegaConfig(rule=rule, softmax=softmax)
    scores = initial_scores(config, 8, torch.Generator())
    assert weighting(scores, config)(torch.tensor([3, 1, 7, 0])).tolist() == pytest.approx([0.25] * 4)


def pull(logits: Sequence[Tensor], io: BlockIO) -> Tensor:
    """The loss of samples that each pull the first logit to their target."""
    return (logits[0].sum() - io.target[:, 0]).square()


def recording(target: Tensor) -> BlockIO:
    _, spec = torch.utils._pytree.tree_flatten(((), {}))
    return BlockIO(inputs=(), batched=(), spec=spec, target=target)


@pytest.mark.parametrize("softmax", ["batch", "set"])
@pytest.mark.parametrize("rule", ["mse", "gac", "fish"])
def test_a_sample_that_helps_validation_gains_weight_and_a_harmful_one_loses_it(rule: str, softmax: str) -> None:
    """Two kinds of training samples pull a logit apart; validation sides with the first kind."""
    train = recording(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]).repeat(4, 1))
    settings = OmegaConfig(
        rule=rule,
        softmax=softmax,
        groups=2,
        meta_steps=20,
        meta_learning_rate=0.05,
        inner_step=0.01,
        batch=16,
        validation_batch=4,
    )
    scores = aligned(pull, train, settings)
    assert scores[train.target[:, 0] > 0].min() > scores[train.target[:, 0] < 0].max()


def test_matching_plain_inner_products_exactly_can_favour_the_harmful_samples() -> None:
    """L_GM has no normalisation: two groups that agree match better the larger, hence worse, their gradients are."""
    train = recording(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]).repeat(4, 1))
    settings = OmegaConfig(rule="gac-exact", groups=2, meta_steps=20, inner_step=0.01, batch=16, validation_batch=4)
    scores = aligned(pull, train, settings)
    assert scores[train.target[:, 0] > 0].max() < scores[train.target[:, 0] < 0].min()


def aligned(loss: Callable[[Sequence[Tensor], BlockIO], Tensor], train: BlockIO, settings: OmegaConfig) -> Tensor:
    start = initial_scores(settings, len(train), torch.Generator().manual_seed(5))
    held_out = recording(torch.full((10, 1), 1.0))
    generator = torch.Generator().manual_seed(0)
    data = Recordings(train=train, validation=held_out, group=torch.arange(10) % 2)
    return align_scores(loss, [torch.zeros(1)], data, start, settings, generator)


@pytest.mark.parametrize("rule", ["uniform", "random"])
def test_rules_without_meta_updates_keep_their_scores(rule: str) -> None:
    settings = OmegaConfig(rule=rule, batch=4)
    start = initial_scores(settings, 6, torch.Generator().manual_seed(5))
    assert torch.equal(aligned(pull, recording(torch.ones(6, 1)), settings), start)
    assert len(torch.unique(start)) == (6 if rule == "random" else 1)


def test_samples_that_ask_for_nothing_leave_the_scores_as_they_are() -> None:
    settings = OmegaConfig(rule="gac", batch=4)
    train = recording(torch.zeros(6, 1))
    assert torch.equal(aligned(pull, train, settings), initial_scores(settings, 6, torch.Generator()))


def test_only_the_scores_of_the_mini_batch_move() -> None:
    settings = OmegaConfig(rule="mse", batch=4, meta_steps=2, groups=2)
    train = recording(torch.linspace(-1, 2, 12)[:, None])
    moved = aligned(pull, train, settings) != initial_scores(settings, 12, torch.Generator())
    assert moved.sum() == 4


@pytest.mark.parametrize("rule", omega.RULES)
def test_samples_one_after_another_give_what_all_at_once_give(rule: omega.OmegaRule) -> None:
    class Rows:
        """As much of a recording as a loss takes here."""

        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

        def __len__(self) -> int:
            return len(self.x)

        def take(self, index: torch.Tensor) -> "Rows":
            return Rows(self.x[index])

    def losses(p: torch.Tensor, rows: Rows) -> torch.Tensor:
        return (rows.x @ p.reshape(4, 3)).tanh().square().sum(1) * p.square().sum()

    generator = torch.Generator().manual_seed(0)
    point, jacobian, weights = (torch.randn(size, generator=generator) for size in ((12,), (6, 12), (6,)))
    groups = [Rows(torch.randn(2, 4, generator=generator)) for _ in range(3)]
    apart, together = (
        omega.RULES[rule](jacobian, 0.1, point, [task(losses, rows) for rows in groups], weights)
        for task in (omega.Apart, omega._mean)
    )
    torch.testing.assert_close(apart, together)
