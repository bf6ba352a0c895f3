"""The story: float network and calibration set in, quantization plan out (GAC, arXiv 2602.01289, Algorithm 1).

find the layers and blocks; search weight scales; set aside validation samples; start from equal scores
for each block in network order:
    record its inputs from the already quantized prefix and its output in the float network
    update the sample scores by gradient alignment
    reconstruct: learn the rounding with the weights that the scores give
    harden the rounding, quantize the block in place, save it
then observe the activation ranges of the quantized network
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import adaround, affine, blocks, checkpoint, omega, ranges, reconstruct
from calib import config as configs
from calib.attention import OPERANDS
from calib.blocks import Block, BlockIO
from calib.checkpoint import BlockState
from calib.config import QuantConfig
from calib.data import CalibrationSet, Split, split, thin_steps
from calib.layers import float_reasons, quantized_products, require_batch_first, trace
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan
from calib.progress import Meter, Progress, block_costs
from calib.reconstruct import BlockResult, LayerWeight


def calibrate(
    model: nn.Module,
    data: CalibrationSet,
    config: QuantConfig,
    *,
    timesteps: int,
    about: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QuantPlan:
    """Quantize `model` and return the plan; the model itself is not changed.

    Args:
        model: float32 network in eval mode, called as (x (N, C, H, W), t (N,)) -> (N, C, H, W).
        data: what the float network saw at each sampling step.
        config: bits, schedule, sample weights, convention, seed.
        timesteps: number of training timesteps; `t` lies below it.
        about: copied into the plan.
        folder: finished blocks are kept here, and taken from here if they belong to the same calibration.
        on_progress: told after every iteration and block.

    Raises:
        CalibError: nothing to quantize, too few samples, or a network of another form.
    """
    found = trace(model, tuple(data.x.shape[1:]), timesteps)
    reasons = float_reasons(found, config.convention, config.keep_float)
    quantized = [layer.name for layer in found.layers if layer.name not in reasons]
    products = quantized_products(found, config.convention, reasons)
    per_step = config.activation.per_step
    if per_step:
        require_batch_first(found, quantized)
    order, loose = blocks.find_blocks(found, quantized)
    if config.reconstruction.iterations == 0:  # nothing to reconstruct: every layer is rounded to nearest
        order, loose = [], quantized
    scales = {n: _scale(model, n, config) for n in quantized}
    subset = split(
        thin_steps(data, config.weight_steps), config.omega.validation, config.omega.groups, _generator(config, "split")
    )
    key = _key(model, data, config)
    meter = Meter(block_costs(model, order, data, config), on_progress)

    network = copy.deepcopy(model)
    codes = {n: _nearest(model, n, scales[n], config) for n in loose}
    results = [BlockResult(name=n, layers=(n,), loss_before=None, loss_after=None, rounding="nearest") for n in loose]
    _put(network, codes, scales)
    scores = omega.initial_scores(len(subset.train), config.omega.batch)
    for i, block in enumerate(order):
        state = checkpoint.load_block(folder, i, key) if folder else None
        resumed = state is not None
        if state is None:
            tick = meter.block(i, block.name, config.reconstruction.iterations)
            state = _calibrate_block(model, network, block, scales, subset, scores, config, folder, tick)
            if folder:
                checkpoint.save_block(folder, i, key, state)
        _put(network, state.codes, scales)
        codes, scores = codes | state.codes, state.scores
        results.append(state.result)
        meter.finished(i, state.result, resumed)
    if folder:
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    batches = ranges.draw(data, config.activation, _generator(config, "ranges"))
    tick = meter.ranges(len(batches))
    seen = ranges.observe(network, quantized, products, data, batches, config.activation, tick)
    return QuantPlan(
        layers={n: _layer(codes[n], scales[n], seen[n, "input"], seen[n, "output"], config) for n in quantized},
        products={
            n: ProductQuant(**{o: _grid(seen[n, o], config, signed=o != "probability") for o in OPERANDS})
            for n in products
        },
        float_layers=reasons,
        blocks=tuple(results),
        scores=scores,
        config=config,
        about=dict(about or {}),
        num_train=timesteps,
        timesteps=torch.unique(data.t) if per_step else None,
    )


def _calibrate_block(
    model: nn.Module,
    network: nn.Module,
    block: Block,
    scales: Mapping[str, Tensor],
    subset: Split,
    scores: Tensor,
    config: QuantConfig,
    folder: Path | None,
    on_iteration: Callable[[int], None],
) -> BlockState:
    """Record, align, reconstruct and harden one block."""
    generator = _generator(config, block.name)
    module = network.get_submodule(block.name)
    layers = [_layer_weight(block, module, n, scales[n], config) for n in block.layers]
    logits = [adaround.initial_logits(w.weight, w.scale) for w in layers]
    train = _record(model, network, block, subset.train, config, folder and folder / "scratch" / "train")
    loss = reconstruct.per_sample_loss(module, layers)
    if config.omega.rule == "gac":
        held_out = _record(
            model, network, block, subset.validation, config, folder and folder / "scratch" / "validation"
        )
        scores = omega.align(loss, logits, train, held_out, subset.group, scores, config.omega, generator)
    logits = reconstruct.fit(
        loss, logits, train, scores, config.omega.temperature, config.reconstruction, generator, on_iteration
    )
    codes, result = reconstruct.decide(module, block.name, block.layers, layers, logits, train)
    return BlockState(codes=dict(zip(block.layers, codes, strict=True)), scores=scores, result=result)


def _record(
    model: nn.Module, network: nn.Module, block: Block, data: CalibrationSet, config: QuantConfig, scratch: Path | None
) -> BlockIO:
    """Pair the block's inputs in the quantized network with its output in the float one (asymmetric)."""
    inputs, spec = blocks.record_inputs(network, block.name, data, config.micro_batch, scratch)
    target = blocks.record_output(model, block.name, data, config.micro_batch, scratch)
    return BlockIO(inputs=inputs, spec=spec, target=target)


def _layer_weight(block: Block, module: nn.Module, name: str, scale: Tensor, config: QuantConfig) -> LayerWeight:
    inner = name[len(block.name) :].lstrip(".")
    weight = module.get_submodule(inner).weight
    assert isinstance(weight, Tensor)
    key = f"{inner}.weight" if inner else "weight"
    return LayerWeight(key=key, weight=weight.detach().clone(), scale=scale, bits=config.weight.bits)


def _scale(model: nn.Module, name: str, config: QuantConfig) -> Tensor:
    w = config.weight
    return affine.search_weight_scale(_weight(model, name), w.bits, w.norm, w.candidates)


def _nearest(model: nn.Module, name: str, scale: Tensor, config: QuantConfig) -> Tensor:
    weight = _weight(model, name)
    return affine.quantize(weight, affine.per_channel(scale, weight.ndim), config.weight.bits)


def _put(network: nn.Module, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, integer in codes.items():
            _weight(network, name).copy_(integer * affine.per_channel(scales[name], integer.ndim))


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _layer(
    codes: Tensor, scale: Tensor, inputs: Sequence[float], outputs: Sequence[float], config: QuantConfig
) -> LayerQuant:
    grid = _grid(inputs, config)
    return LayerQuant(
        codes=codes,
        weight_scale=scale,
        weight_bits=config.weight.bits,
        input_scale=grid.scale,
        input_bits=grid.bits,
        input_ratio=grid.ratio,
        output_scale=ranges.scale_of(max(outputs), 8),
    )


def _grid(magnitudes: Sequence[float], config: QuantConfig, *, signed: bool = True) -> Grid:
    """Return the grid for the largest magnitudes seen; one that is not signed always has 8 bits."""
    bits = config.activation.bits if signed else 8
    scales = torch.tensor([ranges.scale_of(magnitude, bits, signed=signed) for magnitude in magnitudes])
    ratio = scales / scales.max() if config.activation.per_step else None
    return Grid(scale=float(scales.max()), bits=bits, signed=signed, ratio=ratio)


def _generator(config: QuantConfig, purpose: str) -> torch.Generator:
    """Return a stream of its own for each purpose, so that resuming does not shift another's numbers."""
    digest = hashlib.sha256(f"{config.seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _key(model: nn.Module, data: CalibrationSet, config: QuantConfig) -> str:
    """Identify a calibration by its settings, samples and float weights."""
    sha = hashlib.sha256(json.dumps(configs.to_json(config), sort_keys=True).encode())
    for tensor in (data.x, data.t, data.step, *model.state_dict().values()):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
