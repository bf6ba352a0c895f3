"""A whole denoising step as one graph: the network, its time tables, and the sampler's update.

    x (N, C, H, W), step (1,) [, condition ...] [, noise (N, C, H, W)] [, previous (N, C, H, W)]
        -> x_next, step_next, eps [, clean]

`noise` is an input if the sampler adds any; `previous` (the x0 of the step before) and `clean` (this step's) exist if
the sampler looks back. The sampler's coefficients (`samplers.Coefficients`) are tables indexed by `step`, as is all
that the network computes from t alone. So a loop is this graph S times, its outputs fed back to its inputs, and can run
without leaving a GPU. For a server that batches requests, `step` can have one entry for each image, (N,), and with it
`guidance`.
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


def _append_update(graph: ir.Graph, rows: Sequence[Coefficients], clip: float | None) -> None:
    """Append the sampler's update to a graph whose inputs are x and step, and whose output is eps.

    With c.name for a field of the step's `Coefficients`:

        eps'   = c.gain * (eps - c.bias)
        x0     = clip(c.x_to_clean * x - c.epsilon_to_clean * eps')
        x_next = c.keep * x + c.clean * x0 + c.direction * eps' + c.previous * previous + c.fresh * noise - c.shift

    Terms whose coefficients are 0 at all steps are left out. Every node's name begins with "update.", by which
    `graph.precision` keeps all of this in float32.
    """
    write = GraphWriter(graph)
    x, step = graph.inputs[:2]
    (epsilon,) = graph.outputs
    used = {name for name in Coefficients.__dataclass_fields__ if any(np.any(getattr(row, name)) for row in rows)}

    def scaled(name: str, value: ir.Value, op: str = "Mul") -> ir.Value:
        """Apply `op` to `value` (N, C, H, W) and the step's row of a table, (1 or N, 1, 1, 1) or (1 or N, C, 1, 1)."""
        table = np.array([getattr(row, name) for row in rows], dtype=np.float32).reshape(len(rows), -1, 1, 1)
        factor = write.node("Gather", [write.constant(f"update.{name}.rows", table), step], f"update.{name}.row")
        return write.node(op, [value, factor], f"update.{name}")

    noise = scaled("bias", epsilon, "Sub") if "bias" in used else epsilon
    noise = scaled("gain", noise) if "gain" in used else noise
    clean = write.node("Sub", [scaled("x_to_clean", x), scaled("epsilon_to_clean", noise)], "update.unclipped")
    # Clipping x0 to the range of images is part of how DDPM samplers are defined, not a safeguard.
    if clip is not None:
        bounds = [write.constant(f"update.clip.{i}", np.float32(bound)) for i, bound in enumerate((-clip, clip))]
        clean = write.node("Clip", [clean, *bounds], "update.clipped")
    parts = {"keep": x, "clean": clean, "direction": noise}
    for name, source in (("previous", "previous"), ("fresh", "noise")):
        if name in used:  # only then does the graph have that input
            parts[name] = ir.Value(name=source, type=x.type, shape=ir.Shape(x.shape or ()))
            graph.inputs.append(parts[name])
    terms = [scaled(name, part) for name, part in parts.items() if name in used]
    total = terms[0]
    for term in terms[1:]:
        total = write.node("Add", [total, term], "update.sum")
    total = scaled("shift", total, "Sub") if "shift" in used else total
    one = write.constant("update.one", np.ones(1, dtype=np.int64))
    # `step` is counted inside the graph, so that a loop on a GPU needs nothing from the host.
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
