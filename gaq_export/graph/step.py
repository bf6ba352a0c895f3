"""A whole denoising step as one graph: the network, its time tables, and the sampler's update.

    x (N, C, H, W), step (1,) [, condition ...] [, noise (N, C, H, W)] [, previous (N, C, H, W)]
        -> x_next, step_next, eps [, clean]

`noise` is an input if the sampler adds any; `previous` (the x0 of the step before) and `clean` (this step's) exist if
the sampler looks back. The sampler's coefficients (`samplers.Coefficients`) are tables indexed by `step`, as is all
that the network computes from t alone. So a loop is this graph S times, its outputs fed back to its inputs, and can run
without leaving a GPU. For a server that batches requests, `step` can have one entry for each image, (N,), and with it
`guidance`.
"""

import functools
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
    step_per_image: bool = False,
) -> StepInfo:
    """Turn a float graph (x, t, condition ...) -> eps into a step of a sampler, in place.

    Args:
        model: graph from `export_float`.
        schedule: the noise schedule that the network was trained with.
        spec: the sampler.
        correction: correction of the noise that the graph, once quantized, will predict.
        guided: put classifier-free guidance around the network.
        step_per_image: `step` is (N,), one for each image, and not (1,).

    Returns:
        What `gaq_export.graph.qdq` needs to know about the step.

    Raises:
        GaqError: the sampler does not suit the schedule, or something in the graph cannot be tabulated.
    """
    visited = timesteps(spec, schedule.num_train)
    baked = make_time_tables(model, visited)
    x, step = model.graph.inputs[:2]
    if step_per_image:
        step.shape = ir.Shape((x.shape or ())[:1])  # (1,) -> (N,): the Gathers that read it take either
    index = add_guidance(model.graph, step_per_image=step_per_image) if guided else step
    # After guidance, so that the update sees one prediction for each image, and the correction applies to that.
    _append_update(model.graph, samplers.table(schedule, spec, correction), schedule.clip)
    return StepInfo(timesteps=visited, baked=baked, index=index)


class _CoefficientTables:
    """The sampler's coefficients as tables of the graph, one row for each step.

    Args:
        write: what adds nodes to the graph.
        step: index of the step, (1,) or (N,).
        rows: coefficients of each step, (S,).
    """

    def __init__(self, write: GraphWriter, step: ir.Value, rows: Sequence[Coefficients]) -> None:
        self._write = write
        self._step = step
        self._rows = rows
        # A coefficient that is 0 at all steps needs no term, and no input that it would be multiplied with.
        self.used = {name for name in Coefficients.__dataclass_fields__ if any(np.any(getattr(r, name)) for r in rows)}

    def apply(self, name: str, value: ir.Value, op: str = "Mul") -> ir.Value:
        """Return op(value, the step's row of a table): (N, C, H, W) with (1 or N, 1 or C, 1, 1)."""
        values = [getattr(row, name) for row in self._rows]
        table = np.array(values, dtype=np.float32).reshape(len(values), -1, 1, 1)  # (S, 1 or C, 1, 1)
        rows = self._write.constant(f"update.{name}.rows", table)
        factor = self._write.node("Gather", [rows, self._step], f"update.{name}.row")
        return self._write.node(op, [value, factor], f"update.{name}")


def _append_update(graph: ir.Graph, rows: Sequence[Coefficients], clip: float | None) -> None:
    """Append the sampler's update to a graph whose inputs are x and step, and whose output is eps.

    With c.name for a field of the step's `Coefficients`:

        eps'   = c.gain * (eps - c.bias)
        x0     = clip(c.x_to_clean * x - c.epsilon_to_clean * eps')
        x_next = c.keep * x + c.clean * x0 + c.direction * eps' + c.previous * previous + c.fresh * noise - c.shift

    Every node's name begins with "update.", by which `graph.precision` keeps all of this in float32.
    """
    write = GraphWriter(graph)
    x, step = graph.inputs[:2]
    (epsilon,) = graph.outputs
    tables = _CoefficientTables(write, step, rows)
    noise = tables.apply("bias", epsilon, "Sub") if "bias" in tables.used else epsilon
    noise = tables.apply("gain", noise) if "gain" in tables.used else noise
    from_x = tables.apply("x_to_clean", x)
    clean = write.node("Sub", [from_x, tables.apply("epsilon_to_clean", noise)], "update.unclipped")
    if clip is not None:  # schedules of pixels define x0 as clipped; those of latents do not
        bounds = [write.constant(f"update.clip.{i}", np.float32(bound)) for i, bound in enumerate((-clip, clip))]
        clean = write.node("Clip", [clean, *bounds], "update.clipped")
    parts = {"keep": x, "clean": clean, "direction": noise}
    for name, source in (("previous", "previous"), ("fresh", "noise")):
        if name in tables.used:  # only then does the graph have that input
            parts[name] = ir.Value(name=source, type=x.type, shape=ir.Shape(x.shape or ()))
            graph.inputs.append(parts[name])
    terms = [tables.apply(name, part) for name, part in parts.items() if name in tables.used]
    total = functools.reduce(lambda total, term: write.node("Add", [total, term], "update.sum"), terms)
    total = tables.apply("shift", total, "Sub") if "shift" in tables.used else total
    one = write.constant("update.one", np.ones(1, dtype=np.int64))
    # `step` is counted inside the graph, so that a loop on a GPU needs no number from the host.
    counted = write.node("Add", [step, one], "update.step", ir.DataType.INT64)
    write.append()
    outputs = {"x_next": total, "step_next": counted, "eps": epsilon}
    if "previous" in tables.used:
        outputs["clean"] = clean
    for name, value in outputs.items():
        value.name = name
        value.shape = ir.Shape((step if name == "step_next" else x).shape or ())
    graph.outputs[:] = outputs.values()
