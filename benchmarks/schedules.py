"""How good is the rounding of a block, and after how much work? The fast schedule against the paper's, block by block.

    python benchmarks/schedules.py --out docs/results/schedules-ddpm-mnist.md

Each schedule fits the same block on the same recording: inputs from a network whose earlier blocks are rounded to
nearest at W4, targets from the float network. The loss is measured after hardening, on the samples that were fitted
and on samples of other images. Seconds are the processor time of one thread.
"""

import copy
import time
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from torch import nn

from calib import adaround, affine, gptq, omega, reconstruct
from calib.adaround import LayerWeight
from calib.block_recording import open_recorder
from calib.blocks import Block, BlockIO, find_blocks
from calib.calibrate import weight_samples
from calib.choices import OmegaRule, RoundingStart
from calib.config import OmegaConfig, QuantConfig, ReconstructionConfig
from calib.fitting import Fit, fit_rounding
from calib.float_layers import float_reasons
from calib.trace import trace
from command import write_markdown
from gaq_export.models.loader import load_model
from gaq_export.quantize.presets import preset
from gaq_export.quantize.trajectories import collect
from gaq_export.report.markdown import machine, markdown_table
from options import ModelName, Out

BITS = 4
HELD_OUT = 0.25  # of the images of each step
HEAD = ("block", "schedule", "iterations x batch", "fitted", "held out", "seconds")
FAST = preset("fast").config.reconstruction
SCHEDULES = {
    "GPTQ alone": ReconstructionConfig(iterations=0, start=RoundingStart.GPTQ),
    "fast": FAST,
    "fast, from the float weight": ReconstructionConfig(
        iterations=FAST.iterations, batch=FAST.batch, learning_rate=FAST.learning_rate
    ),
    "fast, 1 000 iterations": ReconstructionConfig(
        iterations=1000, batch=FAST.batch, learning_rate=FAST.learning_rate, start=FAST.start
    ),
    "paper, 2 000 iterations": ReconstructionConfig(iterations=2000),
    "paper": ReconstructionConfig(),
}


def main(
    model: ModelName = "ddpm-mnist",
    blocks: Annotated[str, typer.Option(help="Names, with commas between them.")] = (
        "unet.up_blocks.0.resnets.0,unet.mid_block.attentions.0"
    ),
    schedules: Annotated[str, typer.Option(help="Names, with commas between them; all if empty.")] = "",
    images: Annotated[int, typer.Option()] = 64,
    out: Out = None,
) -> None:
    """Fit every block with every schedule."""
    torch.set_num_threads(1)
    loaded = load_model(model)
    network, shape = loaded.network, loaded.shape
    data = collect(loaded, loaded.spec.sampler, images=images)
    config = QuantConfig(weight_steps=10, omega=OmegaConfig(rule=OmegaRule.UNIFORM, validation=HELD_OUT))
    subset = weight_samples(data, config, network)
    traced = trace(network, shape, loaded.schedule.num_train)
    reasons = float_reasons(traced, config.convention)
    order, _ = find_blocks(traced, [layer.name for layer in traced.layers if layer.name not in reasons])
    rounded = copy.deepcopy(network)
    rows: list[tuple[str, ...]] = []
    with open_recorder(network, rounded, subset.data, config.micro_batch) as recording:
        for block in order:
            module = network.get_submodule(block.name)
            scales = {name: affine.search_weight_scale(_weight(network, name), BITS) for name in block.layers}
            layers = reconstruct.layer_weights(module, block, scales, dict.fromkeys(block.layers, BITS))
            if block.name in blocks.split(","):
                io = recording.record(block)
                parts = io.part(subset.train), io.part(subset.validation)
                rows += _rows(module, block, layers, *parts, schedules)
            _round_to_nearest(rounded, block, layers)
            recording.finish(block)
    n = len(subset.train), len(subset.validation)
    head = [
        f"{model} W{BITS}, {n[0]} samples fitted, {n[1]} of other images held out; mean block loss after hardening,",
        "relative to rounding to nearest (lower is better).",
        f"One run, one thread, {machine()}, torch {torch.__version__}.",
        "",
    ]
    write_markdown([*head, *markdown_table(HEAD, rows)], out)


def _rows(
    module: nn.Module, block: Block, layers: Sequence[LayerWeight], train: BlockIO, held_out: BlockIO, wanted: str
) -> Sequence[tuple[str, ...]]:
    names = wanted.split(",") if wanted else list(SCHEDULES)
    nearest = [affine.quantize_weight(w.weight, w.scale, w.bits) for w in layers]
    base = [reconstruct.mean_loss(module, layers, nearest, io) for io in (train, held_out)]
    rows = []
    for name in names:
        config = SCHEDULES[name]
        started = time.process_time()
        codes = _fitted(module, layers, train, config)
        seconds = time.process_time() - started
        fitted, other = (
            reconstruct.mean_loss(module, layers, codes, io) / b for io, b in zip((train, held_out), base, strict=True)
        )
        work = f"{config.iterations} x {config.batch}"
        rows.append((block.name, name, work, f"{fitted:.3f}", f"{other:.3f}", f"{seconds:.0f}"))
        print(*rows[-1], sep="  ", flush=True)
    return rows


def _fitted(
    module: nn.Module, layers: Sequence[LayerWeight], io: BlockIO, config: ReconstructionConfig
) -> list[torch.Tensor]:
    """Return the codes that the schedule ends with."""
    weighting = OmegaConfig(rule=OmegaRule.UNIFORM)
    generator = torch.Generator().manual_seed(0)
    start = gptq.STARTS[config.start](module, layers, io, generator)
    scores = omega.initial_scores(weighting, len(io), generator)
    loss = reconstruct.weight_loss(module, layers)
    fit = Fit(omega=weighting, settings=config, scores=scores, generator=generator)
    logits = fit_rounding(loss, list(zip(layers, start, strict=True)), io, fit)
    return [adaround.hard_codes(w.weight, w.scale, v, w.bits) for w, v in zip(layers, logits, strict=True)]


def _round_to_nearest(network: nn.Module, block: Block, layers: Sequence[LayerWeight]) -> None:
    with torch.no_grad():
        for name, w in zip(block.layers, layers, strict=True):
            codes = affine.quantize_weight(w.weight, w.scale, w.bits)
            _weight(network, name).copy_(affine.dequantize_weight(codes, w.scale))


def _weight(network: nn.Module, name: str) -> nn.Parameter:
    return network.get_parameter(f"{name}.weight")


if __name__ == "__main__":
    typer.run(main)
