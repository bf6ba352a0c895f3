"""Measure how long a network takes on a backend with all its layers at one width, for budgets in milliseconds.

In: a network, names of layers, and widths. Out: milliseconds by width, measured on engines built for the purpose.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

import engines
from calib import affine
from calib.config import FLOAT_BITS, QuantConfig
from calib.devices import HOST, on_device
from calib.files import write_atomically
from calib.plan import Grid, LayerQuant, QuantPlan
from calib.records import Count, Positive, read_kept_record, signed
from engines import EngineConfig, EngineFile
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.models.loader import LoadedModel

BATCH = 4  # images
ROUNDS = 25  # timed calls of each engine
WARM_UP = 5  # calls before those: runtimes allocate and choose kernels in the first ones


@dataclass(frozen=True, kw_only=True)
class _Conditions:
    backend: str
    batch: Count
    widths: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Times:
    """The cached measurement: milliseconds by width, "4" or "32", and what they were measured under."""

    conditions: _Conditions
    milliseconds: dict[str, Positive]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepClock:
    """Measures how long a network takes at several widths, for `calib.mixed_precision`.

    No two measurements are the same, so the first one is cached: an interrupted calibration continues with the same
    times, and so with the same bits.

    Attributes:
        model: The float model.
        cache: JSON file of the times.
        backend: Runtime to measure on; the best one installed if None.
    """

    model: LoadedModel
    cache: Path
    backend: str | None = None

    def __call__(self, network: nn.Module, layers: Sequence[str], widths: Sequence[int]) -> dict[int, float]:
        """Return the milliseconds that a step of BATCH images takes at each width.

        With guidance a step is a call with twice as many samples.

        Args:
            network: The model's network as it will be quantized.
            layers: Names of the layers that get the width.
            widths: Weight bits; FLOAT_BITS for the network in float.
        """
        backend = self.backend or engines.best_backend()
        batch = 2 * BATCH if self.model.guided else BATCH
        conditions = _Conditions(backend=backend, batch=batch, widths=tuple(widths), layers=tuple(layers))
        # Times measured under other conditions are measured again.
        cached = read_kept_record(_Times, self.cache)
        if (
            cached is not None
            and cached.conditions == conditions
            and cached.milliseconds.keys() == set(map(str, widths))
        ):
            return {int(bits): ms for bits, ms in cached.milliseconds.items()}  # JSON has no integer keys
        # Exported once, as a proto that `_build` reads anew for each width, because Q/DQ is inserted in place.
        exported = ir.to_proto(export_float(on_device(network, HOST), self.model.shape, self.model.condition_inputs))
        with tempfile.TemporaryDirectory() as scratch:
            calls = {}
            for bits in widths:
                plan = None if bits == FLOAT_BITS else _rounded(network, layers, bits)
                file = _build(exported, plan, Path(scratch), EngineConfig(backend=backend, batch=(batch, batch, batch)))
                calls[bits] = _call(self.model, file, batch)
            times = _median_ms(calls)
        write_atomically(
            self.cache,
            signed(asdict(_Times(conditions=conditions, milliseconds={str(b): ms for b, ms in times.items()}))),
        )
        return times


def _median_ms(calls: Mapping[int, Callable[[], object]]) -> dict[int, float]:
    """Return the median milliseconds of each call.

    The calls take turns: if the machine slows down meanwhile, it slows them all down alike.
    """
    seconds: dict[int, list[float]] = {bits: [] for bits in calls}
    for _ in range(WARM_UP + ROUNDS):
        for bits, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[bits].append(time.perf_counter() - started)
    return {bits: 1000 * statistics.median(times[WARM_UP:]) for bits, times in seconds.items()}


def _build(exported: onnx.ModelProto, plan: QuantPlan | None, scratch: Path, config: EngineConfig) -> EngineFile:
    """Build the engine of the float graph, or of a plan for it."""
    profile = find_profile(engines.find_backend(config.backend).profile)
    graph = ir.from_proto(exported)
    if plan is not None:
        insert_qdq(graph, plan, profile)
    if profile.openvino_forms:
        rewrite_for_openvino(graph)
    save_onnx(graph, scratch / "unet.onnx")
    return engines.build(scratch / "unet.onnx", scratch / "unet.plan", config)


def _call(model: LoadedModel, file: EngineFile, batch: int) -> Callable[[], object]:
    """Open an engine; return a function that runs it once on `batch` samples in the middle of the noise schedule."""
    engine = engines.open_engine(file)
    x = np.random.default_rng(0).standard_normal((batch, *model.shape), np.float32)
    # (1, ...) -> (N, ...)
    condition = {name: row.expand(batch, *row.shape[1:]).numpy() for name, row in model.condition_inputs.items()}
    feeds = {"x": x, "t": np.full(batch, model.schedule.num_train // 2), **condition}
    return lambda: engine(feeds)


def _rounded(network: nn.Module, layers: Sequence[str], bits: int) -> QuantPlan:
    """Return a quick plan of the layers at one width: the values of the codes do not matter for the time."""
    weights = {name: network.get_parameter(f"{name}.weight").detach() for name in layers}
    scales: Mapping[str, torch.Tensor] = {
        name: affine.search_weight_scale(weight, bits, candidates=1) for name, weight in weights.items()
    }
    quant = {
        name: LayerQuant(
            codes=affine.quantize_weight(weight, scales[name], bits),
            weight_scale=scales[name],
            weight_bits=bits,
            input=Grid(scale=2.0**-5, bits=8),  # any scale does
            output_scale=2.0**-5,
        )
        for name, weight in weights.items()
    }
    return QuantPlan(
        layers=quant,
        products={},
        float_layers={},
        blocks=(),
        scores=torch.zeros(0),
        config=QuantConfig(),
        provenance={},
        num_train=1,
    )
