"""How long a network takes on a backend with all its layers at one width, for budgets of milliseconds."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

import engines
from calib import affine
from calib.config import FLOAT_BITS, QuantConfig
from calib.files import write_atomically
from calib.plan import Grid, LayerQuant, QuantPlan
from engines import EngineConfig
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.models.loader import LoadedModel

BATCH, ROUNDS, WARM_UP = 4, 25, 5


def step_times(
    model: LoadedModel,
    network: nn.Module,
    layers: Sequence[str],
    widths: Sequence[int],
    kept: Path,
    backend: str | None = None,
) -> dict[int, float]:
    """Return the milliseconds that BATCH images take at each width: medians of engines that run in turn.

    With guidance that is a call with twice as many samples.

    Args:
        model: the float model.
        network: its network as it is going to be quantized.
        layers: names of the layers that have the width.
        widths: weight bits; FLOAT_BITS for the network in float.
        kept: JSON file that keeps the times, and is believed if it is there: no two measurements are the same.
        backend: the best present if None.
    """
    backend = backend or engines.best_backend()
    batch = BATCH if model.conditioning is None or not model.conditioning.guided else 2 * BATCH
    conditioning = {"backend": backend, "batch": batch, "widths": list(widths), "layers": list(layers)}
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["conditions"] == conditioning:
        return {int(bits): ms for bits, ms in found["milliseconds"].items()}
    exported = ir.to_proto(export_float(network, model.shape, model.condition_inputs))
    with tempfile.TemporaryDirectory() as scratch:
        plans = {bits: None if bits == FLOAT_BITS else _rounded(network, layers, bits) for bits in widths}
        runs = {bits: _engine(model, exported, plan, backend, batch, Path(scratch)) for bits, plan in plans.items()}
        seconds: dict[int, list[float]] = {bits: [] for bits in widths}
        for _ in range(WARM_UP + ROUNDS):
            for bits, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[bits].append(time.perf_counter() - started)
    times = {bits: 1000 * statistics.median(row[WARM_UP:]) for bits, row in seconds.items()}
    write_atomically(kept, json.dumps({"conditions": conditioning, "milliseconds": times}, indent=1).encode())
    return times


def _engine(
    model: LoadedModel, exported: onnx.ModelProto, plan: QuantPlan | None, backend: str, batch: int, scratch: Path
) -> Callable[[], object]:
    """Build the engine of the float graph or of a plan for it, and return what runs it once."""
    profile, graph = find_profile(engines.find_backend(backend).profile), ir.from_proto(exported)
    if plan is not None:
        insert_qdq(graph, plan, profile)
    if profile.openvino_forms:
        rewrite_for_openvino(graph)
    save_onnx(graph, scratch / "unet.onnx")
    config = EngineConfig(backend=backend, batch=(batch, batch, batch))
    engine = engines.open_engine(engines.build(scratch / "unet.onnx", scratch / "unet.plan", config))
    x = np.random.default_rng(0).standard_normal((batch, *model.shape), np.float32)
    condition = {name: row.expand(batch, *row.shape[1:]).numpy() for name, row in model.condition_inputs.items()}
    feeds = {"x": x, "t": np.full(batch, model.schedule.num_train // 2), **condition}
    return lambda: engine(feeds)


def _rounded(network: nn.Module, layers: Sequence[str], bits: int) -> QuantPlan:
    """Return a plan of the layers; what it rounds to does not matter for time."""
    weights = {name: network.get_parameter(f"{name}.weight").detach() for name in layers}
    scales: Mapping[str, torch.Tensor] = {
        name: affine.search_weight_scale(weight, bits, candidates=1) for name, weight in weights.items()
    }
    quant = {
        name: LayerQuant(
            codes=affine.quantize_weight(weight, scales[name], bits),
            weight_scale=scales[name],
            weight_bits=bits,
            input=Grid(scale=2.0**-5, bits=8),
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
