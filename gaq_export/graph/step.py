"""A whole denoising step as one graph: the network, its temporal tables, and the sampler's update.

    x (N, C, H, W), step (1,) [, what the network is told] [, noise (N, C, H, W)] [, previous (N, C, H, W)]
        -> x_next, step_next, eps [, clean]

`noise` is there if the sampler adds any, `previous` (the x0 of the step before) and `clean` (this step's) if it looks
back. The sampler's coefficients (`samplers.Coefficients`) are tables indexed by `step`, as is everything
that the network computes from t alone. So a loop is this graph S times, its outputs fed back to its inputs. For a
server that puts requests together, `step` can have a row for each image, (N,), and with it `guidance`.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from calib.correction import Correction
from gaq_export.diffusion import samplers
from gaq_export.diffusion.samplers import Coefficients
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, timesteps
from gaq_export.graph.guidance import add_guidance
from gaq_export.graph.qdq import StepInfo
from gaq_export.graph.time_tables import make_time_tables
from gaq_export.graph.writer import GraphWriter

# Output of a step -> the input of the next that it becomes.
FEEDBACK = {"x_next": "x", "step_next": "step", "clean": "previous"}


def make_step(
    model: ir.Model,
    schedule: NoiseSchedule,
    spec: SamplerSpec,
    correction: Correction | None = None,
    *,
    guided: bool = False,
    rows: bool = False,
) -> StepInfo:
    """Turn a float graph (x, t, told ...) -> eps into one of the steps that `spec` takes; in place.

    Args:
        model: graph from `export_float`.
        schedule: what the network was trained with.
        spec: the sampler.
        correction: of the noise that the graph, once quantized, will predict.
        guided: with `gaq_export.graph.guidance` around the network.
        rows: with a step for each image in place of one for all.

    Returns:
        What `gaq_export.graph.qdq` needs to know of it.

    Raises:
        GaqError: the sampler does not suit the schedule, or the graph cannot be tabulated.
    """
    visited = timesteps(spec, schedule.num_train)
    baked = make_time_tables(model, visited)
    x, step = model.graph.inputs[:2]
    if rows:
        step.shape = ir.Shape((x.shape or ())[:1])
    index = add_guidance(model.graph, rows=rows) if guided else step
    _append_update(model.graph, samplers.table(schedule, spec, correction), schedule.clip)
    return StepInfo(timesteps=visited, baked=baked, index=index)


def _append_update(graph: ir.Graph, rows: Sequence[Coefficients], clip: float | None) -> None:
    """Append the sampler's update to a graph whose inputs are x and step, and whose output is eps."""
    write, (x, step), (epsilon,) = GraphWriter(graph), graph.inputs[:2], graph.outputs
    used = {name for name in Coefficients.__dataclass_fields__ if any(np.any(getattr(row, name)) for row in rows)}

    def scaled(name: str, value: ir.Value, op: str = "Mul") -> ir.Value:
        """Multiply by the step's row of a table, (1, 1, 1, 1) or (1, C, 1, 1), or do another `op` with it."""
        table = np.array([getattr(row, name) for row in rows], dtype=np.float32).reshape(len(rows), -1, 1, 1)
        factor = write.node("Gather", [write.constant(f"update.{name}.rows", table), step], f"update.{name}.row")
        return write.node(op, [value, factor], f"update.{name}")

    noise = scaled("bias", epsilon, "Sub") if "bias" in used else epsilon
    noise = scaled("gain", noise) if "gain" in used else noise
    clean = write.node("Sub", [scaled("x_to_clean", x), scaled("epsilon_to_clean", noise)], "update.unclipped")
    if clip is not None:
        bounds = [write.constant(f"update.clip.{i}", np.float32(bound)) for i, bound in enumerate((-clip, clip))]
        clean = write.node("Clip", [clean, *bounds], "update.clipped")
    parts = {"keep": x, "clean": clean, "direction": noise}
    for name, source in (("previous", "previous"), ("fresh", "noise")):
        if name in used:
            parts[name] = ir.Value(name=source, type=x.type, shape=ir.Shape(x.shape or ()))
            graph.inputs.append(parts[name])
    terms = [scaled(name, part) for name, part in parts.items() if name in used]
    total = terms[0]
    for term in terms[1:]:
        total = write.node("Add", [total, term], "update.sum")
    total = scaled("shift", total, "Sub") if "shift" in used else total
    one = write.constant("update.one", np.ones(1, dtype=np.int64))
    outputs = {
        "x_next": total,
        "step_next": write.node("Add", [step, one], "update.step", ir.DataType.INT64),
        "eps": epsilon,
        **({"clean": clean} if "previous" in used else {}),
    }
    write.append()
    for name, value in outputs.items():
        value.name, value.shape = name, ir.Shape((step if name == "step_next" else x).shape or ())
    graph.outputs[:] = outputs.values()
