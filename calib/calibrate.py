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

from calib import affine, blocks, checkpoint, dynamic, mixed, omega, power_law, ranges, temporal
from calib import config as configs
from calib.attention import OPERANDS
from calib.block_fit import Job, calibrate_block
from calib.block_recording import recorder
from calib.blocks import Block
from calib.checkpoint import BlockState
from calib.config import QuantConfig
from calib.cost import FLOAT_BITS
from calib.data import CalibrationSet, Split, split
from calib.errors import CalibError
from calib.fakequant import round_input
from calib.layers import Trace, float_reasons, quantized_products, readers, require_batch_first, trace
from calib.mixed import Assignment, Clock
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan
from calib.progress import Meter, Progress, block_costs
from calib.ranges import Reach
from calib.reconstruct import BlockResult
from calib.seeds import stream
from calib.selection import select
from calib.shared_copy import hold, twin
from calib.surgery import operate, plan_surgery


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
    model = operate(model, surgery)
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
    network = twin(model)
    job = Job(
        model=model,
        network=network,
        scales=scales,
        bits=bits,
        subset=weight_samples(data, config, model),
        config=config,
        key=_key(model, data, config, order, bits),
        folder=folder if order else None,
        meter=Meter(block_costs(model, order, data, config), on_progress),
    )
    codes = {n: affine.quantize_weight(_weight(model, n), scales[n], bits[n]) for n in loose}
    _put(network, codes, scales)
    states = _calibrate_blocks(job, order)
    codes |= {name: integer for state in states for name, integer in state.codes.items()}
    together = readers(found, quantized)
    grids = _share(together, {name: grid for state in states for name, grid in state.grids.items()})
    if config.activation.sizes != "ranges":
        grids = dynamic.step_grids(network, together, data, config.activation, timesteps, config.seed)
    seen = _reaches(job, quantized, products, data)
    tailed = frozenset[str]()
    if config.activation.logarithmic:
        tailed = power_law.heavy_tailed(network, products, data, stream(config.seed, "tails"))
    return QuantPlan(
        layers={
            n: _layer(
                codes[n],
                scales[n],
                bits[n],
                grids.get(n) or ranges.grids(seen[n, "input"], config.activation),
                seen[n, "output"],
            )
            for n in quantized
        },
        products={
            n: ProductQuant(
                **{o: ranges.operand_grid(seen[n, o], o, config.activation.bits, log2=n in tailed) for o in OPERANDS}
            )
            for n in products
        },
        float_layers=reasons,
        blocks=(*(_untouched(n) for n in loose), *(state.result for state in states)),
        scores=states[-1].scores if states else _first_scores(job),
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
) -> Assignment:
    """Return the weight bits of each layer: the same for all, or the best within the budget."""
    if not config.mixed.budget:
        return Assignment(bits=dict.fromkeys(layers, config.weight.bits), errors=None)

    def report_step(done: int, total: int) -> None:
        on_progress(
            Progress(stage="bits", name=f"bits, layer {done}/{total}", index=0, total=0, fraction=0.0, seconds={})
        )

    return mixed.assign(model, data, layers, config, timesteps, clock, report_step)


def _cut(
    model: nn.Module, found: Trace, quantized: Sequence[str], data: CalibrationSet, config: QuantConfig
) -> tuple[list[Block], Sequence[str]]:
    """Cut the network up: the temporal block, if there is one, and the others in network order; the layers in none.

    Without iterations from the float weight there is nothing to reconstruct, and every layer is in none.
    """
    if config.reconstruction.iterations == 0 and config.reconstruction.start == "float":
        return [], quantized
    first = temporal.find_block(model, found, quantized, tuple(data.x.shape[1:]), data.cond)
    apart = {n for block in first for n in block.layers}
    order, loose = blocks.find_blocks(found, [n for n in quantized if n not in apart])
    return first + order, loose


def weight_samples(data: CalibrationSet, config: QuantConfig, model: nn.Module) -> Split:
    """Return the samples that calibrate weights, the validation samples set aside; `model` is the float network."""
    return split(
        select(data, config, model), config.omega.validation, config.omega.groups, stream(config.seed, "split")
    )


def _calibrate_blocks(job: Job, order: Sequence[Block]) -> list[BlockState]:
    """Calibrate the blocks in order, or take them from the folder."""
    states: list[BlockState] = []
    scores = _first_scores(job)
    reference = job.config.reconstruction.wants_reference
    with recorder(
        job.model, job.network, job.subset.data, job.config.micro_batch, job.folder, reference=reference
    ) as recording:
        for i, block in enumerate(order):
            state = checkpoint.load_block(job.folder, i, job.key) if job.folder else None
            resumed = state is not None
            if state is None:
                with job.meter.phase("record"):
                    io = recording.record(block)
                tick = job.meter.block(i, block.name, job.config.reconstruction.passes)
                state = calibrate_block(job, block, io, scores, tick)
                if job.folder:
                    checkpoint.save_block(job.folder, i, job.key, state)
            _put(job.network, state.codes, job.scales)
            if job.config.reconstruction.activations == "qdrop":  # what follows is fitted to rounded activations too
                for name, grid in state.grids.items():
                    round_input(job.network.get_submodule(name), name, grid)
            recording.finish(block)
            scores = state.scores
            states.append(state)
            job.meter.finished(i, state.result, resumed)
    return states


def _share(together: Sequence[tuple[str, ...]], learned: Mapping[str, Grid]) -> dict[str, tuple[Grid, ...]]:
    """Return the learned grids, those who read the same tensor in different blocks all with the first of theirs."""
    found: dict[str, tuple[Grid, ...]] = {}
    for names in together:
        grid = next((learned[name] for name in names if name in learned), None)
        found |= dict.fromkeys(names, (grid,)) if grid is not None else {}
    return found


def _reaches(
    job: Job, layers: Sequence[str], products: Sequence[str], data: CalibrationSet
) -> dict[tuple[str, str], tuple[Reach, ...]]:
    """Return what `ranges.observe` sees of the network once its weights are quantized."""
    activation = job.config.activation
    batches = ranges.draw(data, activation, stream(job.config.seed, "ranges"))
    with job.meter.phase("ranges"):
        tick = job.meter.ranges(len(batches))
        return ranges.observe(job.network, layers, products, data, batches, activation, tick)


def _first_scores(job: Job) -> Tensor:
    return omega.initial_scores(job.config.omega, len(job.subset.train), stream(job.config.seed, "scores"))


def _untouched(name: str) -> BlockResult:
    return BlockResult(name=name, layers=(name,), loss_before=None, loss_after=None, rounding="nearest")


def _put(network: nn.Module, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    for name, integer in codes.items():
        hold(network.get_submodule(name), integer, scales[name])


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
        output_scale=ranges.scale_of(max(max(reach) for reach in outputs), 8),
    )


def _key(
    model: nn.Module, data: CalibrationSet, config: QuantConfig, order: Sequence[Block], bits: Mapping[str, int]
) -> str:
    """Identify what the blocks depend on: themselves, samples, float weights, all settings but the activations'.

    Those are ranged after the last block, so finished blocks serve any activation bits, unless they learn grids too.
    """
    settings = configs.to_json(config)
    if config.reconstruction.activations == "float":
        del settings["activation"]
    identity = [settings, [(b.name, b.layers) for b in order], dict(bits)]
    sha = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for tensor in (*data.tensors, *model.state_dict().values()):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
