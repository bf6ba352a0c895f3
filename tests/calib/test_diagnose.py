"""Gradients of sampling steps compared, and sample weights set beside alignment: against plain autograd and by hand."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from calib import adaround, affine, diagnose
from calib.block_recording import open_recorder
from calib.blocks import Block, BlockIO
from calib.calibrate import calibrate, weight_samples
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig
from calib.data import CalibrationSet
from calib.diagnose import Agreement, Cosines
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.plan import Grid, LayerQuant, QuantPlan
from calib.reconstruct import BlockResult
from gaq_export.models.architectures import EpsilonModel

CONFIG = QuantConfig(
    reconstruction=ReconstructionConfig(iterations=4, batch=4, learning_rate=0.1),
    activation=ActivationConfig(batch=8),
    omega=OmegaConfig(meta_steps=1, batch=4, validation_batch=2),
    weight_steps=3,
    micro_batch=4,
)


def noise() -> CalibrationSet:
    """Return 24 samples, four at each of six steps; three steps calibrate weights."""
    x = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    step = torch.arange(6).repeat_interleave(4)
    return CalibrationSet(x=x, t=95 - 18 * step, step=step)


@pytest.fixture(scope="module")
def network(make_tiny_unet) -> nn.Module:
    return EpsilonModel(make_tiny_unet())


@pytest.fixture(scope="module")
def plan(network: nn.Module) -> QuantPlan:
    return calibrate(network, noise(), CONFIG, timesteps=100)


@pytest.fixture(scope="module")
def recorded(network: nn.Module, plan: QuantPlan) -> Callable[[str], tuple[BlockResult, BlockIO, BlockIO]]:
    """Return what finds a block of the plan, and records it on its training and its validation samples."""
    quantized, subset = fake_quantized(network, plan, activations=False), weight_samples(noise(), CONFIG, network)

    def record(name: str) -> tuple[BlockResult, BlockIO, BlockIO]:
        block = next(b for b in plan.blocks if b.name == name)
        with open_recorder(network, quantized, subset.data, 4) as recording:
            io = recording.record(Block(name=name, layers=block.layers))
        return block, io.part(subset.train), io.part(subset.validation)

    return record


def train_steps(network: nn.Module) -> torch.Tensor:
    subset = weight_samples(noise(), CONFIG, network)
    return subset.data.step[subset.train]


RESNET, ATTENTION = "unet.mid_block.resnets.0", "unet.mid_block.attentions.0"


def losses(module: nn.Module, io: BlockIO, index: Tensor) -> Tensor:
    """Return (m,) as calib.reconstruct defines the block loss, from a plain call of the module."""
    taken = io.take(index)
    args, kwargs = taken.call()
    return (module(*args, **kwargs) - taken.target).square().sum(1).flatten(1).mean(1)


@pytest.mark.parametrize("name", [RESNET, ATTENTION])
def test_a_steps_gradient_is_that_of_its_mean_loss_at_the_rounded_weights(name: str, network, plan, recorded) -> None:
    block, io, _ = recorded(name)
    step = train_steps(network)
    result = diagnose.agreement(network, plan, block, io, step)
    rounded = {
        "before": lambda w, q: affine.fake_quantize(w, affine.per_channel(q.weight_scale, w.ndim), q.weight_bits),
        "after": lambda w, q: affine.dequantize_weight(q.codes, q.weight_scale),
    }
    for which, cosines in (("before", result.before), ("after", result.after)):
        whole = copy.deepcopy(network)
        weights = [whole.get_submodule(n).weight for n in block.layers]
        with torch.no_grad():
            for w, n in zip(weights, block.layers, strict=True):
                w.copy_(rounded[which](w, plan.layers[n]))
        rows = []
        for s in torch.unique(step):
            mean = losses(whole.get_submodule(name), io, (step == s).nonzero()[:, 0]).mean()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, weights)]))
        expected = cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=2)
        torch.testing.assert_close(cosines.matrix, expected, rtol=0, atol=1e-5)
        assert -1 <= cosines.halves < 1
    assert not torch.equal(result.before.matrix, result.after.matrix)
    assert (result.steps, result.samples) == ((0, 2, 4), 3)


@pytest.mark.parametrize("name", [RESNET, ATTENTION])
def test_alignment_is_the_inner_product_of_per_sample_gradients(name: str, network, plan, recorded) -> None:
    block, train, validation = recorded(name)
    result = diagnose.alignment(network, plan, block, train, validation)
    module, weights = copy.deepcopy(network).get_submodule(name), {}
    logits = []
    for n in block.layers:
        q, key = plan.layers[n], f"{n.removeprefix(name).lstrip('.')}.weight"
        weight = module.get_submodule(key.removesuffix(".weight")).weight.detach()
        logits.append(adaround.initial_logits(weight, q.weight_scale).requires_grad_())
        weights[key] = adaround.soft_weight(weight, q.weight_scale, logits[-1], q.weight_bits)

    def gradient(io: BlockIO, index: Tensor) -> Tensor:
        taken = io.take(index)
        out = torch.func.functional_call(module, weights, *taken.call())
        mean = (out - taken.target).square().sum(1).flatten(1).mean(1).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(mean, logits, retain_graph=True)])

    towards = gradient(validation, torch.arange(len(validation)))
    expected = torch.stack([gradient(train, torch.tensor([i])) @ towards for i in range(len(train))])
    assert expected.abs().max() > 0
    torch.testing.assert_close(result.inner.float(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert result.omega.sum() == pytest.approx(1)
    assert torch.equal(result.omega.argsort(), plan.scores.argsort())
    assert result.validation == 3


def opposed() -> tuple[nn.Module, QuantPlan, BlockResult, BlockIO, Tensor]:
    """Return y = w x with w = 0.5, and six samples: steps 0 and 1 want a larger w, step 2 a smaller one."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    codes = torch.tensor([[1]], dtype=torch.int8)
    layer = LayerQuant(
        codes=codes,
        weight_scale=torch.ones(1),
        weight_bits=4,
        input=Grid(scale=1.0, bits=8),
        output_scale=1.0,
    )
    block = BlockResult(name="0", layers=("0",), loss_before=None, loss_after=None, rounding="nearest")
    plan = QuantPlan(
        layers={"0": layer},
        products={},
        float_layers={},
        blocks=(block,),
        scores=torch.zeros(6),
        config=CONFIG,
        provenance={},
        num_train=100,
    )
    x, target = torch.ones(6, 1), torch.tensor([[5.0], [4.0], [9.0], [9.0], [-5.0], [-2.0]])
    leaves, spec = torch.utils._pytree.tree_flatten(((x,), {}))
    return (
        model,
        plan,
        block,
        BlockIO(inputs=tuple(leaves), batched=(True,), spec=spec, target=target),
        torch.arange(3).repeat_interleave(2),
    )


def test_steps_that_pull_apart_have_cosine_minus_one() -> None:
    result = diagnose.agreement(*opposed())
    for cosines in (result.before, result.after):
        assert cosines.matrix.tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
        assert cosines.halves == 1
        assert cosines.between == pytest.approx(-1 / 3)
    assert result == Agreement(block="0", steps=(0, 1, 2), samples=2, before=result.before, after=result.after)


def test_one_sample_a_step_has_no_halves_and_one_step_no_other() -> None:
    model, plan, block, io, _ = opposed()
    assert diagnose.agreement(model, plan, block, io, torch.arange(6)).before.halves is None
    assert diagnose.agreement(model, plan, block, io, torch.zeros(6)).before.between is None


def test_a_cosine_matrix_is_symmetric_and_one_on_the_diagonal() -> None:
    gradients = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-18, 2, 5)[:, None]
    gradients[3] = 0
    matrix = diagnose.cosine_matrix(gradients)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(5))
    assert matrix[3].tolist() == [0, 0, 0, 1, 0]
    small, large = gradients[0].double(), gradients[4].double()
    assert float(matrix[0, 4]) == pytest.approx(float(small @ large / small.norm() / large.norm()), abs=1e-6)
    assert Cosines(matrix=matrix, halves=None).between == pytest.approx((float(matrix.sum()) - 5) / 20, abs=1e-6)


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    rising = torch.arange(5.0)
    assert diagnose.spearman(rising, rising.exp()) == pytest.approx(1)
    assert diagnose.spearman(rising, -(rising**3)) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5
    tied = diagnose.spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert diagnose.spearman(rising, torch.ones(5)) is None


def test_bins_are_of_equal_size_and_never_more_than_samples() -> None:
    key = torch.tensor([6.0, 1.0, 5.0, 2.0, 4.0, 3.0, 7.0])
    means, twice = diagnose.bin_means(key, [key, 2 * key], 3)
    assert means.tolist() == [2, 4.5, 6.5]
    assert twice.tolist() == [4, 9, 13]
    assert diagnose.bin_means(key, [key], 50)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_scores_of_other_samples_are_refused(network, plan, recorded) -> None:
    block, _, validation = recorded(RESNET)
    with pytest.raises(CalibError, match="The plan weighs 9 samples, the collected ones are 3: calibrate again"):
        diagnose.alignment(network, plan, block, validation, validation)


def test_the_block_with_the_largest_loss_is_chosen_unless_one_is_named(network, plan) -> None:
    blocks = diagnose.inspectable_blocks(network, plan, (1, 16, 16), 100)
    assert blocks == list(plan.blocks)
    assert diagnose.choose_block(blocks, None).loss_before == max(b.loss_before for b in blocks)
    assert diagnose.choose_block(blocks, ATTENTION).name == ATTENTION
    with pytest.raises(CalibError, match=f"No block is called 'mid_block.attention'; .* Did you mean '{ATTENTION}'"):
        diagnose.choose_block(blocks, "mid_block.attention")
    unmeasured = [dataclasses.replace(b, loss_before=None, loss_after=None) for b in blocks]
    assert diagnose.choose_block(unmeasured, None) == unmeasured[0]
    assert diagnose.choose_block([], None) is None


def test_a_layer_called_twice_is_no_block_to_look_at(make_foreign) -> None:
    network = make_foreign()
    step = torch.arange(6).repeat_interleave(4)
    data = CalibrationSet(x=noise().x[:, :, :8, :8], t=95 - 18 * step, step=step)
    plan = calibrate(network, data, CONFIG, timesteps=100)
    assert [b.name for b in diagnose.inspectable_blocks(network, plan, (1, 8, 8), 100)] == ["down", "gate", "mlp"]
    assert "shared" in {b.name for b in plan.blocks}
