"""From a plan to an engine: export the backend's graph, build it, audit it, check what it computes.

Everything is built in a folder beside the target and moved there once all of it has passed. A failed build therefore
leaves an earlier engine as it was.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import engines
from calib.data import CalibrationSet
from calib.plan import QuantPlan, load_plan
from calib.ranges import nearest_step
from calib.step_bits import at_bits, widths
from engines import EngineConfig, EngineFile
from engines.files import data_path, files_of
from gaq_export import folders
from gaq_export import run as runs
from gaq_export.deploy import float_timing, parity, submodels, verify
from gaq_export.deploy.float_timing import FloatTiming
from gaq_export.deploy.onnx_artifact import FloatGraph, GraphOptions, correction_for, write_graph
from gaq_export.deploy.parity import Parity
from gaq_export.deploy.record import (
    EngineRecord,
    GraphKind,
    LinkedFile,
    Numbers,
    PlanLink,
    Switching,
    TextEncoders,
    link,
    parse_choice,
)
from gaq_export.deploy.submodels import Part
from gaq_export.devices import ON_HOST
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_float
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.profiles import PROFILES, find_profile
from gaq_export.graph.step import make_step
from gaq_export.models import text_encoder
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import Provenance, files_of_model, find_model, provenance_of
from gaq_export.run import Run

OnBegin = Callable[[str], None]

_PROFILE_SUFFIX = {Numbers.INT8: "", Numbers.FP8: "-fp8"}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built engine; `parity` is None where it cannot run here, and `not_run` says why.

    `timing` compares it with a float engine, if that was measured; `others` are engines that take turns with it, where
    steps differ in activation bits; `decoder` makes images of its latents, if it draws latents; `texts` encode prompts,
    if it takes prompts.
    """

    file: EngineFile
    others: tuple[EngineFile, ...]
    plan: QuantPlan
    parity: Parity | None
    not_run: str | None
    decoder: Part | None = None
    texts: tuple[Part, ...] = ()
    timing: FloatTiming | None = None


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build of a plan.

    Attributes:
        config: backend and batch profile; the best backend present if None.
        graph: whole steps, or the network alone.
        sampler: what the engine will draw with; the plan's if None.
        numbers: integers, or E4M3 floats for TensorRT and plans of 8-bit activations only.
        correct: with the plan's correction of the noise, if it has one.
        rows: a step index for each image in place of one for all, see `make_step`.
        timing: whether to time a float engine of the backend beside it, where it runs; None for yes if the float
            weights take less than `float_timing.LARGEST` bytes.
        step_name: what the run's journal calls this build.
    """

    config: EngineConfig | None = None
    graph: GraphKind = GraphKind.STEP
    sampler: SamplerSpec | None = None
    numbers: Numbers = Numbers.INT8
    correct: bool = True
    rows: bool = False
    timing: bool | None = False
    step_name: str = "build-engine"


def build_engine(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path = "unet.plan",
    config: EngineConfig | None = None,
    graph: str = GraphKind.STEP,
    sampler: SamplerSpec | None = None,
    numbers: str = Numbers.INT8,
    correct: bool = True,
    timing: bool | None = False,
    model: LoadedModel | None = None,
) -> Built:
    """Build an engine from the run's plan, audit it, and check it against fake-quantized PyTorch on the same inputs.

    The files at `out` change only once the new engine has passed.

    Args:
        folder: run folder with a finished plan.
        out: the engine file; its record goes to `<out>.json`.
        config: backend and batch profile; the best backend present if None.
        graph: whole steps, or the network alone; a value of `GraphKind`.
        sampler: what the engine will draw with; the plan's if None.
        numbers: a value of `Numbers`; "fp8" for TensorRT and plans of 8-bit activations only.
        correct: with the plan's correction of the noise, if it has one.
        timing: whether to time a float engine of the same backend beside it, see `BuildOptions`.
        model: the float model; loaded again from the plan's record if None.

    Raises:
        GaqError, CalibError, EngineError: no plan, no backend, numbers that it does not take, a failed build, or an
            engine below the parity floor.
    """
    options = BuildOptions(
        config=config,
        graph=parse_choice("graph", graph, GraphKind),
        sampler=sampler,
        numbers=parse_choice("numbers", numbers, Numbers),
        correct=correct,
        timing=timing,
    )
    return build(Run(folder=Path(folder)), Path(out), options, model)


def build(
    run: Run,
    out: Path,
    options: BuildOptions,
    model: LoadedModel | None = None,
    on_begin: OnBegin = lambda stage: None,
) -> Built:
    """Build an engine; see `build_engine`, which is this with its options spelled out.

    Args:
        run: run folder with a finished plan.
        out: the engine file.
        options: what to build.
        model: the float model; loaded again from the plan's record if None.
        on_begin: called with the name of each stage as it begins; how much of a stage is done is not known.
    """
    on_begin("loading the model")
    job = _prepare(run, options, model)
    _check_target(job, out)
    not_run = job.backend.can_run(job.config.gpu)
    on_begin("collecting inputs for the check")
    # Where the engine cannot run, as for another GPU, it is built all the same and not checked.
    data = None if not_run else verify.samples(job.model, job.sampler, job.plan, job.run, job.config)
    with folders.staging(out) as staged:
        if job.model.conditioning is not None:
            job.model.conditioning.save(staged)
        # Before the denoiser, whose record names their files with sha256.
        on_begin("building the decoder and the text encoders")
        decoder = build_decoder(job.model, staged / out.name, job.config, data)
        texts, encoders = build_texts(job.model, staged / out.name, job.config, check=data is not None)
        record = replace(job.record, decoder=_link_to(decoder), text_encoders=encoders)
        with folders.staging(out) as scratch:
            exact = _float_graph(job, scratch) if not_run is None else None
            files, checks = _build_graphs(replace(job, exact=exact), record, staged / out.name, data, on_begin)
            timing = _time(files[-1], exact, job.config, on_begin)
        _put(staged, out)
    merged = parity.merge(checks) if checks else None
    _add_to_journal(job, out, files, merged, timing)
    # Loaded again, because the paths in `files` are those in the staging folder. The widest is last.
    *others, file = (engines.load_engine_file(out.with_name(file.path.name)) for file in files)
    return Built(
        file=file,
        others=tuple(others),
        plan=job.plan,
        parity=merged,
        not_run=not_run,
        decoder=decoder and _moved(decoder, out),
        texts=tuple(_moved(encoder, out) for encoder in texts),
        timing=timing,
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A build with everything it needs in memory."""

    run: Run
    options: BuildOptions
    config: EngineConfig
    backend: engines.Backend
    profile: str
    plan: QuantPlan
    model: LoadedModel
    sampler: SamplerSpec
    turns: tuple[int, ...]  # activation bits of each step, (S,)
    record: EngineRecord = field(repr=False)  # without what only the build brings: tables, decoder, text encoders
    exact: FloatGraph | None = None  # of the float network, to be written beside the last graph


def _prepare(run: Run, options: BuildOptions, model: LoadedModel | None) -> _Job:
    """Read the plan, find the model, and report everything that can be wrong before anything is built."""
    config = options.config or EngineConfig(backend=engines.best_backend())
    backend = engines.find_backend(config.backend)
    if reason := backend.can_build():
        raise GaqError(f"{backend.name} cannot build here: {reason}")
    plan = load_plan(run.plan)
    sha256 = engines.sha256_of(run.plan)
    profile = _profile(backend, options.numbers, plan)
    provenance = provenance_of(plan)
    model = find_model(provenance, model, run.folder).on(ON_HOST)  # where graphs are exported
    sampler = options.sampler or provenance.sampler
    turns = _turns(plan, sampler, model.schedule.num_train, options.graph)
    record = EngineRecord(
        # The sampler that the engine is for, in place of the one that calibration followed.
        provenance=replace(provenance, sampler=sampler),
        graph=options.graph,
        bits=_bits(plan, turns),
        numbers=options.numbers,
        plan=PlanLink(sha256=sha256, layers=len(plan.layers)),
        correction=correction_for(plan, sampler) if options.correct else None,
    )
    return _Job(
        run=run,
        options=options,
        config=config,
        backend=backend,
        profile=profile,
        plan=plan,
        model=model,
        sampler=sampler,
        turns=turns,
        record=record,
    )


def _check_target(job: _Job, out: Path) -> None:
    """Raise GaqError if one of the engine's files would take the place of something that is needed."""
    folders.check_name(out)  # first, since other names are made from it
    widths = [out.with_name(f"{out.stem}-a{bits}{out.suffix}") for bits in sorted(set(job.turns))[:-1]]
    texts = [submodels.text_path(out, index) for index in range(2)]
    written = [file for path in (out, *widths, submodels.decoder_path(out), *texts) for file in files_of(path)]
    # The run's graphs and pages too: the next export would take the engine's place in turn.
    pages = [job.run.inspection, job.run.report, *job.run.folder.glob("unet.*.onnx*")]
    folders.check_outputs(written, [*runs.files_of_calibration(job.run), *pages, *files_of_model(job.model)])


def _build_graphs(
    job: _Job, record: EngineRecord, out: Path, data: CalibrationSet | None, on_begin: OnBegin
) -> tuple[list[EngineFile], list[Parity]]:
    """Build an engine for each activation width of the steps, and check each on its own steps."""
    files = list[EngineFile]()
    checks = list[Parity]()
    order = sorted(set(job.turns))  # the widest last, since its record names the others
    for abits in order:
        last = abits == order[-1]
        options = GraphOptions(
            graph=job.options.graph,
            sampler=job.sampler,
            # A runtime that is not strongly typed chooses its types itself, and wants a float32 graph.
            compute=job.backend.compute(job.config.compute) if job.backend.typed else "float32",
            correct=job.options.correct,
            abits=None if job.plan.step_bits is None else abits,
            rows=job.options.rows,
            exact=job.exact if last else None,
        )
        on_begin("exporting the graph")
        exported = write_graph(job.profile, job.plan, job.model, options, folder=job.run.folder)
        switching = Switching(engines=tuple(map(link, files)), turns=tuple(order.index(bits) for bits in job.turns))
        # Tables depend on the graph, so every engine has its own record; only the last one names the others.
        own_record = replace(record, tables=exported.tables, switching=switching if last and files else None)
        path = out if last else out.with_name(f"{out.stem}-a{abits}{out.suffix}")
        on_begin(f"building with {job.backend.name}")
        files.append(engines.build(exported.path, path, job.config, own_record.to_json()))
        if data is not None:
            on_begin("checking against PyTorch")
            target = verify.Target(profile=job.profile, turns=job.turns, abits=abits)
            checks.append(verify.check(files[-1], at_bits(job.plan, abits), job.model, data, target))
    return files, checks


def _float_graph(job: _Job, folder: Path) -> FloatGraph | None:
    """Return where the float graph goes and in what type, None if no float engine is to be timed."""
    timing = job.options.timing
    if timing is None:
        held = sum(parameter.nbytes for parameter in job.model.network.parameters())
        timing = held < float_timing.LARGEST
    compute = float_timing.float_compute(job.backend, job.config.compute)
    # A runtime that is not strongly typed chooses its types itself, and wants a float32 graph.
    return (
        FloatGraph(path=folder / "float.onnx", compute=compute if job.backend.typed else "float32") if timing else None
    )


def _time(file: EngineFile, exact: FloatGraph | None, config: EngineConfig, on_begin: OnBegin) -> FloatTiming | None:
    if exact is None:
        return None
    on_begin("timing beside float")
    return float_timing.measure(file, exact.path, config)


def _add_to_journal(
    job: _Job, out: Path, files: Sequence[EngineFile], checked: Parity | None, timing: FloatTiming | None
) -> None:
    runs.add_entry(
        job.run,
        job.options.step_name,
        engine=os.path.relpath(out, job.run.folder),  # a run folder can be moved together with its engines
        backend=job.backend.name,
        seconds=round(sum(file.build_seconds for file in files), 1),
        sqnr_db=checked and checked.sqnr_db,
        **(timing.to_json() if timing else {}),
    )


def build_float(
    model: LoadedModel,
    out: Path,
    *,
    sampler: SamplerSpec | None = None,
    config: EngineConfig | None = None,
    compute: str = "float32",
) -> EngineFile:
    """Build an engine of the float network's steps, which draws in the same runtime as a quantized one.

    Args:
        model: the float model.
        out: the engine file.
        sampler: its steps; the model's own if None.
        config: backend and batch profile; the best backend present if None.
        compute: type of its arithmetic, in place of the one in `config`.
    """
    model = model.on(ON_HOST)  # where graphs are exported
    spec = sampler or model.spec.sampler
    config = replace(config or EngineConfig(backend=engines.best_backend()), compute=compute)
    network = export_float(model.network, model.shape, model.condition_inputs)
    make_step(network, model.schedule, spec, guided=model.guided)
    if find_profile(engines.find_backend(config.backend).profile).openvino_forms:
        rewrite_for_openvino(network)
    with folders.staging(out) as staged:
        if model.conditioning is not None:
            model.conditioning.save(staged)
        decoder = build_decoder(model, staged / out.name, config, data=None)
        record = EngineRecord(
            provenance=Provenance.of(model, spec),
            graph=GraphKind.STEP,
            bits="float",
            decoder=_link_to(decoder),
        )
        submodels.build_graph(network, staged / out.name, config, record.to_json())
        _put(staged, out)
    return engines.load_engine_file(out)


def build_decoder(model: LoadedModel, out: Path, config: EngineConfig, data: CalibrationSet | None) -> Part | None:
    """Build the decoder of a model's latents beside `out`, and check it on the last step of `data`; None if none."""
    if model.decoder is None:
        return None
    file = submodels.build_decoder(model.decoder, model.shape, submodels.decoder_path(out), config)
    if data is None:
        return Part(file=file, parity=None)
    # Latents near the end of sampling, the only ones that a decoder is made for.
    last = (data.step == data.step.max()).nonzero()[: max(file.batch[0], min(file.batch[2], parity.IMAGES)), 0]
    return Part(file=file, parity=submodels.check_decoder(model.decoder, file, data.x[last]))


def build_texts(
    model: LoadedModel, out: Path, config: EngineConfig, *, check: bool
) -> tuple[tuple[Part, ...], TextEncoders | None]:
    """Build the text encoders of a model that takes prompts beside `out`.

    Returns:
        The encoders, and what the engine's record says of them; none where the model takes no prompts, its folder has
        no encoders, or transformers is not installed.
    """
    # An engine without text encoders still draws the prompts of its calibration, so a missing library is no error.
    takes_prompts = text_encoder.STATES in model.condition_inputs
    texts = text_encoder.of(model) if takes_prompts and text_encoder.installed() else None
    if texts is None:
        return (), None
    parts = []
    tokenizers = []
    for index, (tokenizer, encoder) in enumerate(zip(texts.tokenizers, texts.encoders, strict=True)):
        assert isinstance(encoder, text_encoder.TextEncoder)  # `of` returns modules, never engines
        path = submodels.text_path(out, index)
        file = submodels.build_text(encoder, path, config)
        parts.append(Part(file=file, parity=submodels.check_text(encoder, file) if check else None))
        tokenizers.append(submodels.write_tokenizer(tokenizer.to_str(), path))
    record = TextEncoders(
        engines=tuple(link(part.file) for part in parts),
        tokenizers=tuple(tokenizers),
        zeros=texts.zeros,
        time_ids=None if texts.time_ids is None else texts.time_ids.tolist(),
    )
    return tuple(parts), record


def _link_to(part: Part | None) -> LinkedFile | None:
    return None if part is None else link(part.file)


def _moved(part: Part, out: Path) -> Part:
    """Return a part with the path that it has after `_put`."""
    return replace(part, file=engines.load_engine_file(out.with_name(part.file.path.name)))


def _put(staged: Path, out: Path) -> None:
    """Move finished files beside `out`, the record that names all others last."""
    # In this order an interrupted move never leaves a new record beside old files.
    finished = sorted(staged.iterdir(), key=lambda path: (path.name.startswith(out.name), path.suffix == ".json"))
    names = {path.name for path in finished}
    for path in finished:
        os.replace(path, out.with_name(path.name))
    for engine in (out.with_name(path.stem) for path in finished if path.suffix == ".json"):
        if data_path(engine).name not in names:
            data_path(engine).unlink(missing_ok=True)  # left by an earlier engine that had its weights apart


def _turns(plan: QuantPlan, spec: SamplerSpec, num_train: int, graph: GraphKind) -> tuple[int, ...]:
    """Return the activation bits of each of the sampler's steps, (S,); raise GaqError if the graph has no steps."""
    visited = timesteps(spec, num_train)
    if plan.step_bits is None or plan.timesteps is None:
        return (plan.config.activation.bits,) * len(visited)
    if graph is not GraphKind.STEP:
        raise GaqError("Steps differ in activation bits in this plan, and --graph eps does not know steps; use step.")
    # The engine's sampler may visit other timesteps than the plan's.
    return tuple(plan.step_bits.bits[k] for k in nearest_step(plan.timesteps, visited))


def _bits(plan: QuantPlan, turns: Sequence[int]) -> str:
    """Return the bits of weights and activations in short: W4A8, or W4/8A6/8 where there are several."""
    weights = {layer.weight_bits for layer in plan.layers.values()}
    return f"W{'/'.join(map(str, sorted(weights)))}A{'/'.join(map(str, sorted(set(turns))))}"


def _profile(backend: engines.Backend, numbers: Numbers, plan: QuantPlan) -> str:
    """Return the profile of the backend's graph; raise GaqError if the backend or the plan does not suit `numbers`."""
    profile = backend.profile + _PROFILE_SUFFIX[numbers]
    if profile not in PROFILES:
        raise GaqError(f"{backend.name} does not compute in {numbers}; tensorrt and tensorrt-rtx do.")
    if numbers is Numbers.FP8 and widths(plan) != (8,):
        raise GaqError(f"FP8 has 8 bits, this plan's activations {list(widths(plan))}: use --numbers int8.")
    return profile
