"""From a plan to an engine: export the backend's graph, build it, audit it, check what it computes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import engines
from calib.data import CalibrationSet
from calib.plan import QuantPlan, load_plan
from calib.ranges import nearest_step
from calib.step_bits import at_bits, widths
from engines import EngineConfig, EngineFile
from engines.files import data_path
from gaq_export import run as runs
from gaq_export.deploy import parity, session, submodels, verify
from gaq_export.deploy.onnx_artifact import correction_of, export_onnx
from gaq_export.deploy.parity import Parity
from gaq_export.deploy.submodels import Part
from gaq_export.diffusion.schedule import SamplerSpec, timesteps
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_float
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.graph.profiles import PROFILES, find_profile
from gaq_export.graph.step import make_step
from gaq_export.models import provenance, text_encoder
from gaq_export.models.loader import LoadedModel
from gaq_export.run import Run

# What weights and activations are rounded to, and what that makes of a backend's profile.
NUMBERS = {"int8": "", "fp8": "-fp8"}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built engine; `parity` is None where it cannot run here, and `not_run` says why.

    `others` take over from it at the steps whose activations have fewer bits, if there are such; `decoder` makes images
    of its latents, if it draws latents; `texts` encode prompts, if it is told such.
    """

    file: EngineFile
    others: tuple[EngineFile, ...]
    plan: QuantPlan
    parity: Parity | None
    not_run: str | None
    decoder: Part | None = None
    texts: tuple[Part, ...] = ()


def build_engine(
    *,
    folder: str | Path = runs.DEFAULT,
    out: str | Path = "unet.plan",
    config: EngineConfig | None = None,
    graph: str = "step",
    sampler: SamplerSpec | None = None,
    numbers: str = "int8",
    correct: bool = True,
    rows: bool = False,
    noted: str = "build-engine",
    model: LoadedModel | None = None,
) -> Built:
    """Build an engine from the run's plan, audit it, and check it against fake-quantized PyTorch on the same inputs.

    The files at `out` change only once the new engine has passed.

    Args:
        folder: run folder with a finished plan.
        out: the engine file; its record goes to `<out>.json`.
        config: backend and batch profile; the best backend present if None.
        graph: a key of `GRAPHS`.
        sampler: what it will draw with; the plan's if None.
        numbers: a key of `NUMBERS`; "fp8" for TensorRT and plans of 8-bit activations only.
        correct: with the plan's correction of the noise, if it has one.
        rows: as for `make_step`.
        noted: what the journal calls it.
        model: the float model; found again from the plan if None.

    Raises:
        GaqError, CalibError, EngineError: no plan, no backend, numbers that it does not take, a failed build, or an
            engine below the parity floor.
    """
    run, out = Run(folder=Path(folder)), Path(out)
    config = config or EngineConfig(backend=engines.best_backend())
    backend = engines.find_backend(config.backend)
    if reason := backend.can_build():
        raise GaqError(f"{backend.name} cannot build here: {reason}")
    plan = load_plan(run.plan)
    profile = _profile(backend, numbers, plan)
    model = provenance.model_of(plan.provenance, model, run.folder)
    spec = sampler or SamplerSpec.from_json(plan.provenance["sampler"])
    turns = _turns(plan, spec, model.schedule.num_train, graph)
    correction = correction_of(plan, spec) if correct else None
    about = {
        **plan.provenance,
        "sampler": spec.to_json(),
        "graph": graph,
        "bits": _bits(plan, turns),
        "numbers": numbers,
        "correction": correction and correction.to_json(),
        "plan": {"sha256": engines.sha256_of(run.plan), "layers": len(plan.layers)},
    }
    not_run, files, checks = backend.can_run(), list[EngineFile](), list[Parity]()
    data = None if not_run else verify.samples(model, spec, plan, run, config)
    with runs.staging(out) as staged:
        if model.conditioning is not None:
            model.conditioning.save(staged)
        decoder = _with_decoder(model, staged / out.name, config, about, data)
        encoders = add_texts(model, staged / out.name, config, about, check=data is not None)
        for abits in sorted(set(turns)):  # the most last, since that engine's record names the others
            exported = export_onnx(
                profile,
                graph=graph,
                sampler=spec,
                compute=backend.compute(config.compute) if backend.typed else "float32",
                correct=correct,
                abits=None if plan.step_bits is None else abits,
                rows=rows,
                folder=run.folder,
                model=model,
            )
            last = abits == max(turns)
            path = staged / (out.name if last else f"{out.stem}-a{abits}{out.suffix}")
            relay = session.describe_relay(files, turns) if last and files else None
            files.append(engines.build(exported.path, path, config, about | {"baked": exported.baked, "relay": relay}))
            if data is not None:
                checks.append(verify.check(files[-1], at_bits(plan, abits), model, data, profile, turns, abits))
        _put(staged, out)
    checked = parity.merge(checks) if checks else None
    runs.add_entry(
        run,
        noted,
        engine=os.path.relpath(out, run.folder),
        backend=backend.name,
        seconds=round(sum(file.build_seconds for file in files), 1),
        sqnr_db=checked and checked.sqnr_db,
    )
    *others, file = (engines.load_engine_file(out.with_name(file.path.name)) for file in files)
    return Built(
        file=file,
        others=tuple(others),
        plan=plan,
        parity=checked,
        not_run=not_run,
        decoder=decoder and _moved(decoder, out),
        texts=tuple(_moved(encoder, out) for encoder in encoders),
    )


def build_float(
    model: LoadedModel, out: Path, *, sampler: SamplerSpec | None = None, config: EngineConfig | None = None
) -> EngineFile:
    """Build an engine of the float network's steps, to draw with as fast and in as many processes as the quantized.

    Args:
        model: the float model.
        out: the engine file.
        sampler: its steps; the model's own if None.
        config: backend and batch profile, its arithmetic float32; the best backend present if None.
    """
    spec = sampler or model.spec.sampler
    config = replace(config or EngineConfig(backend=engines.best_backend()), compute="float32")
    network = export_float(model.network, model.shape, model.condition_inputs)
    make_step(network, model.schedule, spec, guided=model.conditioning is not None and model.conditioning.guided)
    if find_profile(engines.find_backend(config.backend).profile).openvino_forms:
        rewrite_for_openvino(network)
    about = provenance.describe(model, spec)
    about |= {"graph": "step", "bits": "float", "numbers": "int8", "correction": None, "baked": [], "relay": None}
    with runs.staging(out) as staged:
        if model.conditioning is not None:
            model.conditioning.save(staged)
        _with_decoder(model, staged / out.name, config, about, None)
        submodels.build_graph(network, staged / out.name, config, about)
        _put(staged, out)
    return engines.load_engine_file(out)


def _with_decoder(
    model: LoadedModel, out: Path, config: EngineConfig, about: dict[str, Any], data: CalibrationSet | None
) -> Part | None:
    """Build the decoder of a model's latents, if it has one, check it on `data`, and name it in `about`."""
    about.pop("decoder", None)
    if model.decoder is None:
        return None
    file = submodels.build_decoder(model.decoder, model.shape, submodels.decoder_path(out), config)
    about["decoder"] = provenance.describe_decoder(model) | {"engine": session.named(file)}
    if data is None:
        return Part(file=file, parity=None)
    last = (data.step == data.step.max()).nonzero()[: max(file.batch[0], min(file.batch[2], parity.IMAGES)), 0]
    return Part(file=file, parity=submodels.check_decoder(model.decoder, file, data.x[last]))


def add_texts(
    model: LoadedModel, out: Path, config: EngineConfig, about: dict[str, Any], *, check: bool
) -> tuple[Part, ...]:
    """Build the text encoders of a model that is told prompts, if its folder has them, and name them in `about`."""
    about.pop("texts", None)
    found = (
        text_encoder.of(model) if text_encoder.STATES in model.condition_inputs and text_encoder.installed() else None
    )
    if found is None:
        return ()
    parts, tokens = [], []
    for index, (tokenizer, encoder) in enumerate(zip(found.tokenizers, found.encoders, strict=True)):
        assert isinstance(encoder, text_encoder.TextEncoder)
        path = submodels.text_path(out, index)
        file = submodels.build_text(encoder, path, config)
        parts.append(Part(file=file, parity=submodels.check_text(encoder, file) if check else None))
        words = path.with_name(f"{path.name}.tokens.json")
        words.write_text(tokenizer.to_str(), encoding="utf-8")
        tokens.append({"file": words.name, "sha256": engines.sha256_of(words)})
    about["texts"] = {
        "engines": [session.named(part.file) for part in parts],
        "tokens": tokens,
        "zeros": found.zeros,
        "time_ids": None if found.time_ids is None else found.time_ids.tolist(),
    }
    return tuple(parts)


def _moved(part: Part, out: Path) -> Part:
    """Return a part as it is after `_put`."""
    return replace(part, file=engines.load_engine_file(out.with_name(part.file.path.name)))


def _put(staged: Path, out: Path) -> None:
    """Move finished files beside `out`, the record that names all others last."""
    made = sorted(staged.iterdir(), key=lambda path: (path.name.startswith(out.name), path.suffix == ".json"))
    for path in made:
        os.replace(path, out.with_name(path.name))
    for plan in (out.with_name(path.stem) for path in made if path.suffix == ".json"):
        if data_path(plan).name not in {path.name for path in made}:
            data_path(plan).unlink(missing_ok=True)  # of the engine that was here before


def _turns(plan: QuantPlan, spec: SamplerSpec, num_train: int, graph: str) -> tuple[int, ...]:
    """Return the activation bits of each of the sampler's steps; raise GaqError if the graph cannot tell steps."""
    visited = timesteps(spec, num_train)
    if plan.step_bits is None or plan.timesteps is None:
        return (plan.config.activation.bits,) * len(visited)
    if graph != "step":
        raise GaqError("Steps differ in activation bits in this plan, and --graph eps does not know steps; use step.")
    return tuple(plan.step_bits.bits[k] for k in nearest_step(plan.timesteps, visited))


def _bits(plan: QuantPlan, turns: Sequence[int]) -> str:
    """Say how many bits weights and activations have, as W4A8."""
    weights, activations = {layer.weight_bits for layer in plan.layers.values()}, set(turns)
    return "".join(f"{what}{'/'.join(map(str, sorted(w)))}" for what, w in (("W", weights), ("A", activations)))


def _profile(backend: engines.Backend, numbers: str, plan: QuantPlan) -> str:
    """Return the profile of the backend's graph; raise GaqError if it has none of such numbers."""
    if numbers not in NUMBERS:
        raise GaqError(f"Unknown numbers {numbers!r}. Choose one of {list(NUMBERS)}.")
    profile = backend.profile + NUMBERS[numbers]
    if profile not in PROFILES:
        raise GaqError(f"{backend.name} does not compute in {numbers}; tensorrt and tensorrt-rtx do.")
    if numbers == "fp8" and widths(plan) != (8,):
        raise GaqError(f"FP8 has 8 bits, this plan's activations {list(widths(plan))}: use --numbers int8.")
    return profile
