"""Write the quantized graph of a plan as an ONNX file, in the form that one backend takes.

In: a plan, its float model, a profile and `GraphOptions`. Out: an ONNX file in the run folder.
"""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.step_bits import at_bits
from gaq_export import folders
from gaq_export import run as runs
from gaq_export.deploy.record import GraphKind, parse_choice
from gaq_export.devices import ON_HOST
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.precision import compute_in
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import StepInfo, insert_qdq
from gaq_export.graph.step import make_step
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import files_of_model, find_model, provenance_of, rewritten
from gaq_export.run import Run


@dataclass(frozen=True, kw_only=True)
class FloatGraph:
    """Where to write the float graph that a quantized one is compared with, and the type that it computes in."""

    path: Path
    compute: str


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """Which graph to write of a plan.

    Attributes:
        graph: whole steps, or the network alone.
        sampler: whose steps a graph of whole steps takes; the plan's if None.
        compute: type of the arithmetic that is not integer, one of `engines.Compute`, by name.
        correct: with the plan's correction of the noise, if it has one and the graph is of whole steps.
        abits: activation bits of this graph, where the plan's steps differ in them; the widest if None.
        rows: a step index for each image in place of one for all, see `make_step`.
        exact: a float graph of the same kind to write too; none if None.
    """

    graph: GraphKind = GraphKind.STEP
    sampler: SamplerSpec | None = None
    compute: str = "float32"
    correct: bool = True
    abits: int | None = None
    rows: bool = False
    exact: FloatGraph | None = None

    @property
    def kind(self) -> str:
        """The part of the file name that distinguishes the graph from others of the same plan and profile."""
        return self.graph + (".rows" if self.rows else "") + ("" if self.abits is None else f".a{self.abits}")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file, and the modules of the network that are time tables in it."""

    path: Path
    tables: tuple[str, ...]


def export_onnx(
    profile: str,
    *,
    graph: str = GraphKind.STEP,
    sampler: SamplerSpec | None = None,
    compute: str = "float32",
    correct: bool = True,
    folder: str | Path = runs.DEFAULT,
    model: LoadedModel | None = None,
    out: Path | None = None,
) -> Exported:
    """Write the quantized graph of one profile.

    Args:
        profile: a key of `gaq_export.graph.profiles.PROFILES`.
        graph: whole steps, or the network alone; a value of `GraphKind`.
        sampler: whose steps a graph of whole steps takes; the plan's if None.
        compute: type of the arithmetic that is not integer, one of `engines.Compute`, by name.
        correct: with the plan's correction of the noise, if it has one and the graph is of whole steps.
        folder: run folder with a finished plan.
        model: the float model; loaded again from the plan's record if None.
        out: where to write; a file in the run folder if None.

    Raises:
        GaqError, CalibError: no plan, another model, or a graph that does not hold all its layers.
    """
    options = GraphOptions(
        graph=parse_choice("graph", graph, GraphKind), sampler=sampler, compute=compute, correct=correct
    )
    find_profile(profile)  # an unknown one is refused before anything is read
    run = Run(folder=Path(folder))
    plan = load_plan(run.plan)
    model = find_model(provenance_of(plan), model, run.folder).on(ON_HOST)  # where graphs are exported
    if out is not None:
        taken = [*runs.files_of_calibration(run), *runs.files_of_engines(run), *files_of_model(model)]
        folders.check_outputs([out], [*taken, run.inspection, run.report])
    return write_graph(profile, plan, model, options, folder=run.folder, out=out)


def write_graph(
    profile: str,
    plan: QuantPlan,
    model: LoadedModel,
    options: GraphOptions,
    *,
    folder: Path,
    out: Path | None = None,
) -> Exported:
    """Write the quantized graph of a plan and its model; `out` as for `export_onnx`, by default in `folder`."""
    target = find_profile(profile)
    # The plan names the layers of the network after surgery, so the network is rewritten before it is exported.
    plan = at_bits(plan, options.abits or plan.config.activation.bits)
    float_model, model = model, rewritten(model, plan)
    if options.graph is GraphKind.STEP:
        network, step = _step(model, plan, options)
    else:
        network = export_float(model.network, model.shape, model.condition_inputs)
        step = None
    if options.exact is not None:
        # Exporting takes seconds, so the graph is exported again only if the plan's differs in more than Q/DQ.
        copy = network.clone() if model is float_model else _export_exact(float_model, options)
        if target.openvino_forms:
            rewrite_for_openvino(copy)
        save_onnx(compute_in(copy, options.exact.compute), options.exact.path)
    # One file for each kind, so graphs of different kinds do not overwrite each other.
    path = out or Run(folder=folder).onnx(profile, options.kind)
    # In this order: the quantization scales are inserted as float32, and become 16 bits together with the rest.
    insert_qdq(network, plan, target, step)
    if target.openvino_forms:
        rewrite_for_openvino(network)
    save_onnx(compute_in(network, options.compute), path)
    del network
    gc.collect()  # nodes and values refer to each other, and would keep the weights until the engine is built
    return Exported(path=path, tables=tuple(sorted(step.baked)) if step else ())


def _export_exact(model: LoadedModel, options: GraphOptions) -> ir.Model:
    """Return the graph of the float network."""
    network = export_float(model.network, model.shape, model.condition_inputs)
    if options.graph is GraphKind.STEP:
        sampler = options.sampler or model.spec.sampler
        make_step(network, model.schedule, sampler, guided=model.guided, step_per_image=options.rows)
    return network


def _step(model: LoadedModel, plan: QuantPlan, options: GraphOptions) -> tuple[ir.Model, StepInfo]:
    """Return the graph of a step, still float except for the layers that became tables.

    If the plan rounds some of those, the tables hold the rounded values, because the other layers were fitted to them.
    """
    sampler = options.sampler or provenance_of(plan).sampler
    correction = correction_for(plan, sampler) if options.correct else None
    network = export_float(model.network, model.shape, model.condition_inputs)
    step = make_step(network, model.schedule, sampler, correction, guided=model.guided, step_per_image=options.rows)
    # Only the finished step says which layers became tables; if the plan rounds any, it is made again from those.
    rounded = {name: layer for name, layer in plan.layers.items() if name in step.baked}
    if not rounded:
        return network, step
    fake = fake_quantized(model.network, replace(plan, layers=rounded, products={}))
    network = export_float(fake, model.shape, model.condition_inputs)
    step = make_step(network, model.schedule, sampler, correction, guided=model.guided, step_per_image=options.rows)
    return network, step


def correction_for(plan: QuantPlan, sampler: SamplerSpec) -> Correction | None:
    """Return the plan's correction of the noise; raise GaqError if it was measured for another sampler."""
    measured = provenance_of(plan).sampler
    if plan.correction is not None and sampler != measured:
        raise GaqError(
            f"This plan's correction ({plan.correction.rule}) was measured for {measured}, not for {sampler}. "
            "Calibrate with that sampler, or build without the correction (--no-correction)."
        )
    return plan.correction
