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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import affine, block_state, blocks, omega, power_law, ranges, step_scales, temporal
from calib import config as configs
from calib.attention import OPERANDS
from calib.block_calibration import Calibration, calibrate_block
from calib.block_recording import open_recorder
from calib.block_state import BlockState
from calib.blocks import Block
from calib.choices import ActivationLearning, Cache, Rounding, RoundingStart, StepScales
from calib.config import QuantConfig
from calib.data import CalibrationSet, Split, split
from calib.devices import HOST, device_of
from calib.fakequant import round_input
from calib.layer_choice import LayerChoice, choose_layers
from calib.mixed_precision import Clock
from calib.plan import Grid, LayerQuant, ProductQuant, QuantPlan
from calib.progress import Progress, ProgressMeter, expected_times
from calib.ranges import Reach
from calib.reconstruct import BlockResult
from calib.sample_store import SampleStore
from calib.seeds import generator_for
from calib.selection import select
from calib.shared_copy import copy_sharing_tensors, replace_weight_by_codes
from calib.surgery import apply_surgery, plan_surgery
from calib.trace import group_by_input


def calibrate(
    model: nn.Module,
    data: CalibrationSet,
    config: QuantConfig,
    *,
    timesteps: int,
    provenance: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    cache: Cache = Cache.AUTO,
    clock: Clock | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QuantPlan:
    """Quantize `model` and return the plan; the model itself is not changed.

    Args:
        model: float32 network in eval mode, called as (x (N, C, H, W), t (N,)) -> (N, C, H, W), with the data's `cond`
            as a third argument if there is one. All that is computed is computed on its device.
        data: what the float network saw at each sampling step.
        config: bits, schedule, sample weights, convention, seed.
        timesteps: number of training timesteps; every `t` lies below it.
        provenance: which model and sampler the plan belongs to; any JSON object, copied into the plan.
        folder: where finished blocks are saved, and loaded from if they belong to the same calibration.
        cache: where recordings are kept meanwhile.
        clock: measures milliseconds, for a budget in that unit.
        on_progress: called after every iteration and block.

    Raises:
        CalibError: there is no layer to quantize, there are too few samples, or the network has another form.
    """
    data = replace(data, device=device_of(model))
    surgery = plan_surgery(model, data, config.surgery)
    model = apply_surgery(model, surgery)
    chosen = choose_layers(model, data, config, timesteps=timesteps, clock=clock, on_progress=on_progress)
    order, loose = _cut(model, chosen, data, config)
    store = SampleStore(folder=folder, cache=cache, device=data.device)
    calibration = _begin(model, chosen, order, data, config, store, on_progress)
    # Before the blocks, which then see these layers as they will be.
    codes = {name: _nearest(calibration, name) for name in loose}
    _put(calibration, codes)
    states = _calibrate_blocks(calibration, order)
    codes |= {name: integers for state in states for name, integers in state.codes.items()}
    learned = _learned_grids(calibration, chosen, states, timesteps)
    layers, products = _quantized(calibration, chosen, codes, learned)
    by_step = config.activation.per_step or bool(config.activation.narrower)
    return QuantPlan(
        layers=layers,
        products=products,
        float_layers=chosen.float_reasons,
        blocks=(*(_unlearned(name) for name in loose), *(state.result for state in states)),
        scores=states[-1].scores if states else _first_scores(calibration),
        config=config,
        provenance=dict(provenance or {}),
        num_train=timesteps,
        timesteps=torch.unique(data.t) if by_step else None,
        sensitivity=chosen.sensitivity,
        surgery=surgery,
    )


def weight_samples(data: CalibrationSet, config: QuantConfig, model: nn.Module) -> Split:
    """Return the samples that calibrate weights, those for validation set aside.

    Args:
        data: all samples.
        config: which samples calibrate weights, how many validate, and the seed.
        model: the float network, for rules of selection that run it.

    Raises:
        CalibError: there is one sample.
    """
    samples = select(data, config, model)
    return split(samples, config.omega.validation, config.omega.groups, generator_for(config.seed, "split"))


def _cut(
    model: nn.Module, chosen: LayerChoice, data: CalibrationSet, config: QuantConfig
) -> tuple[list[Block], Sequence[str]]:
    """Return the blocks, the temporal one first and the others in network order, and the layers that are in none.

    Without iterations, and starting from the float weight, rounding is to nearest whatever the blocks: there are none.
    """
    if config.reconstruction.iterations == 0 and config.reconstruction.start is RoundingStart.FLOAT:
        return [], chosen.layers
    first = temporal.find_block(model, chosen.traced, chosen.layers, tuple(data.x.shape[1:]), data.cond)
    temporal_layers = {name for block in first for name in block.layers}
    others, loose = blocks.find_blocks(chosen.traced, [n for n in chosen.layers if n not in temporal_layers])
    return first + others, loose


def _begin(
    model: nn.Module,
    chosen: LayerChoice,
    order: Sequence[Block],
    data: CalibrationSet,
    config: QuantConfig,
    store: SampleStore,
    on_progress: Callable[[Progress], None],
) -> Calibration:
    """Search the weight scales, select the samples, and estimate how long each block will take."""
    weight, bits = config.weight, chosen.bits
    scales = {
        name: affine.search_weight_scale(_weight(model, name), bits[name], weight.norm, weight.candidates)
        for name in chosen.layers
    }
    return Calibration(
        model=model,
        network=copy_sharing_tensors(model),
        scales=scales,
        bits=bits,
        data=data,
        samples=weight_samples(data, config, model),
        config=config,
        key=_key(model, data, config, order, bits),
        store=store if order else replace(store, folder=None),
        meter=ProgressMeter(expected_times(model, order, data, config), on_progress, data.device),
    )


def _calibrate_blocks(calibration: Calibration, order: Sequence[Block]) -> list[BlockState]:
    """Calibrate the blocks in order, or load them from the folder."""
    config = calibration.config
    folder = calibration.store.folder
    meter = calibration.meter
    states: list[BlockState] = []
    scores = _first_scores(calibration)
    with open_recorder(
        calibration.model,
        calibration.network,
        calibration.samples.data,
        config.micro_batch,
        calibration.store,
        reference=config.reconstruction.wants_reference,
    ) as recorder:
        for i, block in enumerate(order):
            state = block_state.load_block_state(folder, i, calibration.key) if folder else None
            resumed = state is not None
            if state is None:
                with meter.phase("record"):
                    io = recorder.record(block)
                on_iteration = meter.block(i, block.name, config.reconstruction.passes)
                state = calibrate_block(calibration, block, io, scores, on_iteration)
                if folder:
                    block_state.save_block_state(folder, i, calibration.key, state)
            _put(calibration, state.codes)
            if config.reconstruction.activations is ActivationLearning.QDROP:
                # The blocks behind this one are fitted to rounded activations too.
                for name, grid in state.grids.items():
                    round_input(calibration.network.get_submodule(name), name, grid)
            recorder.finish(block)  # after its weights are quantized: from now on its outputs are replayed
            scores = state.scores
            states.append(state)
            meter.finished(i, state.result, resumed)
    return states


def _learned_grids(
    calibration: Calibration, chosen: LayerChoice, states: Sequence[BlockState], timesteps: int
) -> dict[str, tuple[Grid, ...]]:
    """Return the input grids that were learned, the widest first; layers whose ranges are observed have none here."""
    config = calibration.config
    groups = group_by_input(chosen.traced, chosen.layers)
    if config.activation.sizes is not StepScales.RANGES:
        network, data = calibration.network, calibration.data
        return step_scales.learn_step_grids(network, groups, data, config.activation, timesteps, config.seed)
    by_layer = {name: grid for state in states for name, grid in state.grids.items()}
    grids: dict[str, tuple[Grid, ...]] = {}
    for names in groups:
        # Layers of different blocks that read one tensor all take the first one's grid, since an engine rounds it once.
        if first := next((by_layer[name] for name in names if name in by_layer), None):
            grids |= dict.fromkeys(names, (first,))
    return grids


def _quantized(
    calibration: Calibration,
    chosen: LayerChoice,
    codes: Mapping[str, Tensor],
    learned: Mapping[str, Sequence[Grid]],
) -> tuple[dict[str, LayerQuant], dict[str, ProductQuant]]:
    """Observe the ranges of the network with quantized weights, and put layers and products together."""
    config = calibration.config
    seen = _observed(calibration, chosen)
    layers = {}
    for name in chosen.layers:
        grids = learned.get(name) or ranges.make_grids(seen[name, "input"], config.activation)
        farthest = max(max(reach) for reach in seen[name, "output"])
        layers[name] = LayerQuant(
            codes=codes[name],
            weight_scale=calibration.scales[name].cpu(),
            weight_bits=calibration.bits[name],
            input=grids[0],
            narrower=tuple(grids[1:]),
            output_scale=ranges.symmetric_scale(farthest, 8),
        )
    heavy = frozenset[str]()
    if config.activation.logarithmic:
        drawn = generator_for(config.seed, "tails")
        heavy = power_law.find_heavy_tails(calibration.network, chosen.products, calibration.data, drawn)
    bits = config.activation.bits
    products = {
        name: ProductQuant(
            **{o: ranges.make_operand_grid(seen[name, o], o, bits, log2=name in heavy) for o in OPERANDS}
        )
        for name in chosen.products
    }
    return layers, products


def _observed(calibration: Calibration, chosen: LayerChoice) -> dict[tuple[str, str], tuple[Reach, ...]]:
    activation, data = calibration.config.activation, calibration.data
    batches = ranges.draw_batches(data, activation, generator_for(calibration.config.seed, "ranges"))
    with calibration.meter.phase("ranges"):
        on_batch = calibration.meter.ranges(len(batches))
        return ranges.observe(calibration.network, chosen.layers, chosen.products, data, batches, activation, on_batch)


def _first_scores(calibration: Calibration) -> Tensor:
    drawn = generator_for(calibration.config.seed, "scores")
    return omega.initial_scores(calibration.config.omega, len(calibration.samples.train), drawn)


def _unlearned(name: str) -> BlockResult:
    return BlockResult(name=name, layers=(name,), loss_before=None, loss_after=None, rounding=Rounding.NEAREST)


def _nearest(calibration: Calibration, name: str) -> Tensor:
    """Return the int8 codes of a layer's weight, rounded to nearest."""
    weight, scale = _weight(calibration.model, name), calibration.scales[name]
    return affine.quantize_weight(weight, scale, calibration.bits[name]).cpu()


def _put(calibration: Calibration, codes: Mapping[str, Tensor]) -> None:
    """Quantize layers of the network in place."""
    for name, integers in codes.items():
        replace_weight_by_codes(calibration.network.get_submodule(name), integers, calibration.scales[name])


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _key(
    model: nn.Module, data: CalibrationSet, config: QuantConfig, order: Sequence[Block], bits: Mapping[str, int]
) -> str:
    """Identify what finished blocks depend on: blocks, samples, float weights, and the settings that matter to them.

    Activation settings do not, since ranges are observed after the last block: blocks serve any activation bits. Unless
    grids are learned with the rounding.
    """
    settings = configs.to_json(config)
    if config.reconstruction.activations is ActivationLearning.FLOAT:
        del settings["activation"]
    identity = [settings, [(block.name, block.layers) for block in order], dict(bits)]
    if data.device != HOST:  # another kind of device gives other last bits
        identity.append(data.device.type)
    sha = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for tensor in (*data.tensors, *model.state_dict().values()):
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
