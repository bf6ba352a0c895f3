"""The story: float network and calibration set in, quantization plan out (GAC, arXiv 2602.01289, Algorithm 1).

find the layers and blocks; search weight scales; set aside validation samples; start from equal scores
for each block, the temporal one first, then in network order:
    record its inputs from the already quantized prefix and its output in the float network
    update the sample scores, by gradient alignment or another rule
    reconstruct: learn the rounding with the weights that the scores give
    harden the rounding, quantize the block in place, save it
then observe the activation ranges of the quantized network
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import affine, block_state, blocks, mixed_precision, omega, power_law, ranges, step_scales, temporal
from calib import config as configs
from calib.attention import OPERANDS
from calib.block_calibration import Calibration, calibrate_block
from calib.block_recording import open_recorder
from calib.block_state import BlockState
from calib.blocks import Block
from calib.choices import ActivationLearning, Rounding, RoundingStart, StepScales
from calib.config import FLOAT_BITS, QuantConfig
from calib.data import CalibrationSet, Split, split
from calib.errors import CalibError
from calib.fakequant import round_input
from calib.float_layers import float_reasons, quantized_products, require_batch_first
from calib.mixed_precision import BitAssignment, Clock
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan
from calib.progress import Progress, ProgressMeter, Stage, expected_times
from calib.ranges import Reach
from calib.reconstruct import BlockResult
from calib.seeds import generator_for
from calib.selection import select
from calib.shared_copy import copy_sharing_tensors, replace_weight_by_codes
from calib.surgery import apply_surgery, plan_surgery
from calib.trace import Trace, group_by_input, trace


def calibrate(
    model: nn.Module,
    data: CalibrationSet,
    config: QuantConfig,
    *,
    timesteps: int,
    provenance: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    clock: Clock | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QuantPlan:
    """Quantize `model` and return the plan; the model itself is not changed.

    Args:
        model: float32 network in eval mode, called as (x (N, C, H, W), t (N,)) -> (N, C, H, W), and with the data's
            `cond` as its third argument if that has any.
        data: what the float network saw at each sampling step.
        config: bits, schedule, sample weights, convention, seed.
        timesteps: number of training timesteps; `t` lies below it.
        provenance: which model and sampler the plan belongs to; any JSON object, copied into the plan.
        folder: finished blocks are kept here, and taken from here if they belong to the same calibration.
        clock: measures milliseconds, for a budget of those.
        on_progress: told after every iteration and block.

    Raises:
        CalibError: nothing to quantize, too few samples, or a network of another form.
    """
    shape = tuple(data.x.shape[1:])
    surgery = plan_surgery(model, data, config.surgery)
    model = apply_surgery(model, surgery)
    found = trace(model, shape, timesteps, data.cond)
    reasons = float_reasons(found, config.convention, config.keep_float)
    quantized = [layer.name for layer in found.layers if layer.name not in reasons]
    given = _bits(model, data, quantized, config, timesteps, clock, on_progress)
    bits = given.bits
    reasons |= {n: "left float within the budget, since it matters most" for n in quantized if bits[n] == FLOAT_BITS}
    quantized = [n for n in quantized if n not in reasons]
    if not quantized:
        raise CalibError("The budget has room for every layer in float, so nothing is left to quantize: lower it.")
    products = quantized_products(found, config.convention, reasons)
    if config.activation.per_step:
        require_batch_first(found, quantized)
    order, loose = _cut(model, found, quantized, data, config)
    w = config.weight
    scales = {n: affine.search_weight_scale(_weight(model, n), bits[n], w.norm, w.candidates) for n in quantized}
    network = copy_sharing_tensors(model)
    calibration = Calibration(
        model=model,
        network=network,
        scales=scales,
        bits=bits,
        subset=weight_samples(data, config, model),
        config=config,
        key=_key(model, data, config, order, bits),
        folder=folder if order else None,
        meter=ProgressMeter(expected_times(model, order, data, config), on_progress),
    )
    codes = {n: affine.quantize_weight(_weight(model, n), scales[n], bits[n]) for n in loose}
    _put(network, codes, scales)
    states = _calibrate_blocks(calibration, order)
    codes |= {name: integer for state in states for name, integer in state.codes.items()}
    together = group_by_input(found, quantized)
    grids = _share(together, {name: grid for state in states for name, grid in state.grids.items()})
    if config.activation.sizes is not StepScales.RANGES:
        grids = step_scales.learn_step_grids(network, together, data, config.activation, timesteps, config.seed)
    seen = _reaches(calibration, quantized, products, data)
    tailed = frozenset[str]()
    if config.activation.logarithmic:
        tailed = power_law.find_heavy_tails(network, products, data, generator_for(config.seed, "tails"))
    return QuantPlan(
        layers={
            n: _layer(
                codes[n],
                scales[n],
                bits[n],
                grids.get(n) or ranges.make_grids(seen[n, "input"], config.activation),
                seen[n, "output"],
            )
            for n in quantized
        },
        products={
            n: ProductQuant(
                **{
                    o: ranges.make_operand_grid(seen[n, o], o, config.activation.bits, log2=n in tailed)
                    for o in OPERANDS
                }
            )
            for n in products
        },
        float_layers=reasons,
        blocks=(*(_untouched(n) for n in loose), *(state.result for state in states)),
        scores=states[-1].scores if states else _first_scores(calibration),
        config=config,
        provenance=dict(provenance or {}),
        num_train=timesteps,
        timesteps=torch.unique(data.t) if config.activation.per_step or config.activation.narrower else None,
        sensitivity=given.errors,
        surgery=surgery,
    )


def _bits(
    model: nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    config: QuantConfig,
    timesteps: int,
    clock: Clock | None,
    on_progress: Callable[[Progress], None],
) -> BitAssignment:
    """Return the weight bits of each layer: the same for all, or the best within the budget."""
    if not config.mixed.budget:
        return BitAssignment(bits=dict.fromkeys(layers, config.weight.bits), errors=None)

    def report_step(done: int, total: int) -> None:
        on_progress(
            Progress(stage=Stage.BITS, name=f"bits, layer {done}/{total}", index=0, total=0, fraction=0.0, seconds={})
        )

    return mixed_precision.assign_bits(model, data, layers, config, timesteps, clock, report_step)


def _cut(
    model: nn.Module, found: Trace, quantized: Sequence[str], data: CalibrationSet, config: QuantConfig
) -> tuple[list[Block], Sequence[str]]:
    """Cut the network up: the temporal block, if there is one, and the others in network order; the layers in none.

    Without iterations from the float weight there is nothing to reconstruct, and every layer is in none.
    """
    if config.reconstruction.iterations == 0 and config.reconstruction.start is RoundingStart.FLOAT:
        return [], quantized
    first = temporal.find_block(model, found, quantized, tuple(data.x.shape[1:]), data.cond)
    apart = {n for block in first for n in block.layers}
    order, loose = blocks.find_blocks(found, [n for n in quantized if n not in apart])
    return first + order, loose


def weight_samples(data: CalibrationSet, config: QuantConfig, model: nn.Module) -> Split:
    """Return the samples that calibrate weights, the validation samples set aside; `model` is the float network."""
    return split(
        select(data, config, model), config.omega.validation, config.omega.groups, generator_for(config.seed, "split")
    )


def _calibrate_blocks(calibration: Calibration, order: Sequence[Block]) -> list[BlockState]:
    """Calibrate the blocks in order, or take them from the folder."""
    states: list[BlockState] = []
    scores = _first_scores(calibration)
    reference = calibration.config.reconstruction.wants_reference
    with open_recorder(
        calibration.model,
        calibration.network,
        calibration.subset.data,
        calibration.config.micro_batch,
        calibration.folder,
        reference=reference,
    ) as recording:
        for i, block in enumerate(order):
            state = block_state.load_block_state(calibration.folder, i, calibration.key) if calibration.folder else None
            resumed = state is not None
            if state is None:
                with calibration.meter.phase("record"):
                    io = recording.record(block)
                tick = calibration.meter.block(i, block.name, calibration.config.reconstruction.passes)
                state = calibrate_block(calibration, block, io, scores, tick)
                if calibration.folder:
                    block_state.save_block_state(calibration.folder, i, calibration.key, state)
            _put(calibration.network, state.codes, calibration.scales)
            if (
                calibration.config.reconstruction.activations is ActivationLearning.QDROP
            ):  # what follows is fitted to rounded activations too
                for name, grid in state.grids.items():
                    round_input(calibration.network.get_submodule(name), name, grid)
            recording.finish(block)
            scores = state.scores
            states.append(state)
            calibration.meter.finished(i, state.result, resumed)
    return states


def _share(together: Sequence[tuple[str, ...]], learned: Mapping[str, Grid]) -> dict[str, tuple[Grid, ...]]:
    """Return the learned grids, those who read the same tensor in different blocks all with the first of theirs."""
    found: dict[str, tuple[Grid, ...]] = {}
    for names in together:
        grid = next((learned[name] for name in names if name in learned), None)
        found |= dict.fromkeys(names, (grid,)) if grid is not None else {}
    return found


def _reaches(
    calibration: Calibration, layers: Sequence[str], products: Sequence[str], data: CalibrationSet
) -> dict[tuple[str, str], tuple[Reach, ...]]:
    """Return what `ranges.observe` sees of the network once its weights are quantized."""
    activation = calibration.config.activation
    batches = ranges.draw_batches(data, activation, generator_for(calibration.config.seed, "ranges"))
    with calibration.meter.phase("ranges"):
        tick = calibration.meter.ranges(len(batches))
        return ranges.observe(calibration.network, layers, products, data, batches, activation, tick)


def _first_scores(calibration: Calibration) -> Tensor:
    return omega.initial_scores(
        calibration.config.omega, len(calibration.subset.train), generator_for(calibration.config.seed, "scores")
    )


def _untouched(name: str) -> BlockResult:
    return BlockResult(name=name, layers=(name,), loss_before=None, loss_after=None, rounding=Rounding.NEAREST)


def _put(network: nn.Module, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    for name, integer in codes.items():
        replace_weight_by_codes(network.get_submodule(name), integer, scales[name])


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _layer(
    codes: Tensor,
    scale: Tensor,
    bits: int,
    inputs: Sequence[Grid],
    outputs: Sequence[Reach],
) -> LayerQuant:
    """Put a layer together; the first of its `inputs` is the widest grid."""
    return LayerQuant(
        codes=codes,
        weight_scale=scale,
        weight_bits=bits,
        input=inputs[0],
        narrower=tuple(inputs[1:]),
        output_scale=ranges.symmetric_scale(max(max(reach) for reach in outputs), 8),
    )


def _key(
    model: nn.Module, data: CalibrationSet, config: QuantConfig, order: Sequence[Block], bits: Mapping[str, int]
) -> str:
    """Identify what the blocks depend on: themselves, samples, float weights, all settings but the activations'.

    Those are ranged after the last block, so finished blocks serve any activation bits, unless they learn grids too.
    """
    settings = configs.to_json(config)
    if config.reconstruction.activations is ActivationLearning.FLOAT:
        del settings["activation"]
    identity = [settings, [(b.name, b.layers) for b in order], dict(bits)]
    sha = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for tensor in (*data.tensors, *model.state_dict().values()):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
