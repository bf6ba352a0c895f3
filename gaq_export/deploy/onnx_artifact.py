"""The quantized graph of a plan, as one backend wants it."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.step_bits import at_bits
from gaq_export import run as runs
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.precision import compute_in
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import StepInfo, insert_qdq
from gaq_export.graph.step import make_step
from gaq_export.models import provenance
from gaq_export.models.loader import LoadedModel
from gaq_export.run import Run

# Graph to what it computes.
GRAPHS = {
    "step": "one whole denoising step of a fixed sampler: (x, step) -> x_next",
    "eps": "the network alone, for any sampler: (x, t) -> eps",
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file, and the modules of the network that are tables in it."""

    path: Path
    baked: tuple[str, ...]


def export_onnx(
    profile: str,
    *,
    graph: str = "step",
    sampler: SamplerSpec | None = None,
    compute: str = "float32",
    correct: bool = True,
    abits: int | None = None,
    rows: bool = False,
    folder: str | Path = runs.DEFAULT,
    model: LoadedModel | None = None,
    out: Path | None = None,
) -> Exported:
    """Write the quantized graph of one profile.

    Args:
        profile: a key of `gaq_export.graph.profiles.PROFILES`.
        graph: a key of `GRAPHS`.
        sampler: whose steps a "step" graph takes; the plan's if None.
        compute: type of what is not integer, a key of `gaq_export.graph.precision.COMPUTE`.
        correct: with the plan's correction of the noise, if it has one and `graph` is "step".
        abits: of a plan whose steps differ in activation bits, which it is to have; the most if None.
        rows: as for `make_step`.
        folder: run folder with a finished plan.
        model: the float model; found again from the plan if None.
        out: where to write; a file in the run folder if None.

    Raises:
        GaqError, CalibError: no plan, another model, or a graph that does not hold all its layers.
    """
    if graph not in GRAPHS:
        raise GaqError(f"Unknown graph {graph!r}. Choose one of {list(GRAPHS)}.")
    run, profile_spec = Run(folder=Path(folder)), find_profile(profile)
    plan = load_plan(run.plan)
    plan = at_bits(plan, abits or plan.config.activation.bits)
    model = provenance.rewritten(provenance.model_of(plan.provenance, model, run.folder), plan)
    spec = sampler or SamplerSpec.from_json(plan.provenance["sampler"])
    if graph == "step":
        network, step = _step(model, plan, spec, correction_of(plan, spec) if correct else None, rows)
    else:
        network, step = export_float(model.network, model.shape, model.condition_inputs), None
    path = out or run.onnx(profile, graph + (".rows" if rows else "") + ("" if abits is None else f".a{abits}"))
    insert_qdq(network, plan, profile_spec, step)
    if profile_spec.openvino_forms:
        rewrite_for_openvino(network)
    save_onnx(compute_in(network, compute), path)
    del network
    gc.collect()  # nodes and values refer to each other, and would keep the weights until the engine is built
    return Exported(path=path, baked=tuple(sorted(step.baked)) if step else ())


def _step(
    model: LoadedModel, plan: QuantPlan, spec: SamplerSpec, correction: Correction | None, rows: bool
) -> tuple[ir.Model, StepInfo]:
    """Return the graph of a step, still float but for the layers that became tables.

    If the plan rounds some of those, the tables hold what comes of that: the other layers were fitted to it.
    """
    guided = model.conditioning is not None and model.conditioning.guided
    network = export_float(model.network, model.shape, model.condition_inputs)
    step = make_step(network, model.schedule, spec, correction, guided=guided, rows=rows)
    rounded = {name: layer for name, layer in plan.layers.items() if name in step.baked}
    if not rounded:
        return network, step
    fake = fake_quantized(model.network, replace(plan, layers=rounded, products={}))
    network = export_float(fake, model.shape, model.condition_inputs)
    return network, make_step(network, model.schedule, spec, correction, guided=guided, rows=rows)


def correction_of(plan: QuantPlan, spec: SamplerSpec) -> Correction | None:
    """Return the plan's correction of the noise; raise GaqError if it was measured for another sampler."""
    own = SamplerSpec.from_json(plan.provenance["sampler"])
    if plan.correction is not None and spec != own:
        raise GaqError(
            f"This plan's correction ({plan.correction.rule}) was measured for {own}; asked for {spec}. Calibrate with "
            "that sampler, or build without the correction (--no-correction)."
        )
    return plan.correction
