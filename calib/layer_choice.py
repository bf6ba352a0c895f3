"""Decide what of a network is quantized, and to how many weight bits: the first part of a calibration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from calib import mixed_precision
from calib.config import FLOAT_BITS, QuantConfig
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.float_layers import float_reasons, quantized_products, require_batch_first
from calib.mixed_precision import BitAssignment, Clock
from calib.progress import Progress, Stage
from calib.trace import Trace, trace


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What is quantized.

    Attributes:
        traced: what one pass of the network showed.
        layers: the names of the quantized layers, in call order.
        products: the names of the modules whose products inside attention are quantized.
        float_reasons: why each of the others stays float.
        bits: weight bits by layer name.
        sensitivity: error of the predicted noise by layer and weight bits, if there is a budget.
    """

    traced: Trace
    layers: Sequence[str]
    products: Sequence[str]
    float_reasons: Mapping[str, str]
    bits: Mapping[str, int]
    sensitivity: Mapping[str, Mapping[int, float]] | None


def choose_layers(
    model: nn.Module,
    data: CalibrationSet,
    config: QuantConfig,
    *,
    timesteps: int,
    clock: Clock | None,
    on_progress: Callable[[Progress], None],
) -> LayerChoice:
    """Return what the settings quantize of `model`.

    Args:
        model: the float network, rewritten already.
        data: what it saw at each sampling step.
        config: convention, layers to keep float, bits or a budget.
        timesteps: number of training timesteps.
        clock: measures milliseconds, for a budget in that unit.
        on_progress: called after each layer that a budget makes it measure.

    Raises:
        CalibError: no layer is left to quantize, or a layer cannot have a grid for each step.
    """
    traced = trace(model, tuple(data.x.shape[1:]), timesteps, data.cond)
    reasons = float_reasons(traced, config.convention, config.keep_float)
    candidates = [layer.name for layer in traced.layers if layer.name not in reasons]
    if config.mixed.budget:
        report = partial(_report_layer, on_progress)
        chosen = mixed_precision.assign_bits(model, data, candidates, config, timesteps, clock, report)
    else:
        chosen = BitAssignment(bits=dict.fromkeys(candidates, config.weight.bits), errors=None)
    left = [name for name in candidates if chosen.bits[name] == FLOAT_BITS]
    reasons |= dict.fromkeys(left, "left float within the budget, since it matters most")
    layers = [name for name in candidates if name not in reasons]
    if not layers:
        raise CalibError("The budget has room for every layer in float, so nothing is left to quantize: lower it.")
    if config.activation.per_step:  # a row of an input must belong to one sample, which has one step
        require_batch_first(traced, layers)
    return LayerChoice(
        traced=traced,
        layers=layers,
        products=quantized_products(traced, config.convention, reasons),
        float_reasons=reasons,
        bits=chosen.bits,
        sensitivity=chosen.errors,
    )


def _report_layer(on_progress: Callable[[Progress], None], done: int, total: int) -> None:
    name = f"bits, layer {done}/{total}"
    # How long the blocks will take is only known once the layers are chosen: no share of the work yet.
    on_progress(Progress(stage=Stage.BITS, name=name, index=0, total=0, fraction=0.0, seconds={}))
