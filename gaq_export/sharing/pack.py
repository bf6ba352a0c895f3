"""A finished calibration as one folder to share, in Hugging Face layout, and back.

    README.md, LICENSE ...          a model card; the licences of the source model
    plan.safetensors, plan.json     the quantized layers; the encoded texts that they were calibrated with, if any
    onnx/unet.step.<profile>.onnx   whole denoising steps, quantized, for other tools
    unet/ or transformer/, scheduler/, vae/, text_encoder/ ...    the float model
    evaluation.json                 scores, if there are any
    pack.json                       the calibration's settings, where the float model is, and the sha256 of every file
                                    but the card, which people may edit

A plan holds no biases, no norms and none of the layers that stay float, and an engine is checked on what the float
network draws. So whoever builds from a pack needs the float model. If that is bundled with the tool, made from a seed,
or pinned on the hub, the pack says where it is; otherwise the whole model is in the pack, so that its fingerprint stays
the one in the plan.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

import engines
from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan, save_plan
from calib.records import Count, Sha256, Text, check_record, read_record
from gaq_export import folders
from gaq_export import run as runs
from gaq_export.deploy.onnx_artifact import export_onnx
from gaq_export.devices import ON_HOST
from gaq_export.errors import GaqError
from gaq_export.evaluation.evaluate import DEFAULT, RECORD, Evaluation
from gaq_export.models import hub, text_encoder
from gaq_export.models.architectures import ARCHITECTURES
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model, load_conditioning, provenance_of
from gaq_export.models.source import BUNDLED, MODULE, PACK, SourceKind, WeightSource
from gaq_export.report import report
from gaq_export.run import Run
from gaq_export.sharing import model_card

FORMAT = 1
MARK = "pack.json"
CARD = "README.md"
FOLDER = "pack"  # inside the run folder
LICENCE_FILES = ("license", "licence", "copying", "notice")  # how the names of such files begin


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A pack that was written: `whole` if the float model is in it, `licence` as the Hugging Face hub names it."""

    folder: Path
    size_bytes: int
    whole: bool
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What goes into a pack.

    Attributes:
        whole: the float model, even if it could be loaded from elsewhere.
        licence: of the source model, by its name on the Hugging Face hub; what the model's card says if None.
        evaluation: folder that `evaluate` wrote; the usual one if None, provided that it is about this run's engine.
        profile: of the ONNX file.
    """

    whole: bool = False
    licence: str | None = None
    evaluation: Path | None = None
    profile: str = "reference"


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What goes into a pack, read and checked.

    Attributes:
        run: its run folder.
        plan: of the run.
        model: the float model.
        whole: whether the float model goes in.
        profile: of the ONNX file.
        evaluation: scores of this run's engine, None if there are none.
    """

    run: Run
    plan: QuantPlan
    model: LoadedModel
    whole: bool
    profile: str
    evaluation: Evaluation | None

    @property
    def source(self) -> WeightSource:
        """Where whoever has the pack finds the float model."""
        return PACK if self.whole else self.model.source


def write_pack(
    run: Run,
    out: Path | None = None,
    options: PackOptions = PackOptions(),
    *,
    model: LoadedModel | None = None,
) -> Pack:
    """Write a pack of a run.

    Args:
        run: with a finished plan.
        out: the folder; `pack` in the run folder if None. A pack that is there is replaced.
        options: what goes into it.
        model: the float model; loaded again by the plan's provenance if None.

    Raises:
        GaqError, CalibError: no plan, another model, one that cannot be loaded again, or a place that is taken.
    """
    plan = load_plan(run.plan)
    model = find_model(provenance_of(plan), model, run.folder).on(ON_HOST)
    out = out or run.folder / FOLDER
    folders.check_replaceable(out, MARK)
    contents = _contents(run, plan, model, options)  # before anything is written, since it may raise
    home = _home(model.source)
    terms = _terms(home, model.source) if options.licence is None else {"license": options.licence}
    with folders.staging(out) as staged:
        folder = staged / FOLDER
        _write_files(folder, contents, home, terms)
        size = sum((folder / name).stat().st_size for name in _files(folder))
        folders.replace_folder(folder, out)
    # Relative, so that the run folder can move together with the pack.
    runs.add_entry(run, "pack", folder=os.path.relpath(out, run.folder), bytes=size, whole=contents.whole)
    return Pack(folder=out, size_bytes=size, whole=contents.whole, licence=terms.get("license"))


def _contents(run: Run, plan: QuantPlan, model: LoadedModel, options: PackOptions) -> _Contents:
    """Return what goes into a pack.

    Raises:
        GaqError: the float model has to go in and cannot, or there is no evaluation of this run's engine.
    """
    whole = options.whole or not model.source.public
    # Only an architecture that `load_model` knows can be read back from a folder.
    if whole and (model.source == MODULE or type(model.module) not in ARCHITECTURES):
        raise GaqError(f"{model.spec.name!r} is your own module, which nobody else could load, so it cannot be packed.")
    evaluation = _evaluation(run, options.evaluation)
    return _Contents(run=run, plan=plan, model=model, whole=whole, profile=options.profile, evaluation=evaluation)


def _write_files(folder: Path, contents: _Contents, home: Path | None, terms: Mapping[str, str]) -> None:
    """Write all files of a pack.

    Args:
        folder: where to.
        contents: what goes in.
        home: folder with the source model's card and licences, None if there is none.
        terms: the source model's licence, as in `_terms`.
    """
    _write_model(folder, contents)
    for paper in _papers(home):
        shutil.copyfile(paper, folder / paper.name)
    evaluation = contents.evaluation
    if evaluation is not None:
        shutil.copyfile(evaluation.path, folder / RECORD)
    settings = runs.read_record(contents.run).settings
    # The card lists the other files, and the record holds the hashes of all of those: hence this order.
    content = model_card.Content(
        plan=contents.plan,
        model=contents.model,
        settings=settings,
        terms=terms,
        evaluation=evaluation,
        files=_files(folder),
    )
    write_atomically(folder / CARD, model_card.render(content).encode())
    _write_record(folder, settings, str(contents.source))


def _write_model(folder: Path, contents: _Contents) -> None:
    """Write the plan, what it was conditioned on, the ONNX file and, if the pack is whole, the float model."""
    run = contents.run
    model = contents.model
    moved = replace(contents.plan, provenance=provenance_of(contents.plan).moved_to(contents.source).to_json())
    save_plan(moved, folder / run.plan.name)
    if model.conditioning is not None:
        model.conditioning.save(folder)
    onnx = folder / "onnx" / run.onnx(contents.profile, "step").name
    export_onnx(contents.profile, folder=run.folder, model=model, out=onnx)
    if contents.whole:
        _save_float(model, folder)


def _write_record(folder: Path, settings: Mapping[str, Any], source: str) -> None:
    """Write the pack's record, with the sha256 of every file but the card, which people may edit."""
    record = {
        "format": FORMAT,
        "source": source,
        "settings": {**settings, "model": {**settings["model"], "source": source}},
        "files": {name: engines.sha256_of(folder / name) for name in _files(folder) if name != CARD},
    }
    write_atomically(folder / MARK, json.dumps(record, indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """What `pack.json` holds.

    Attributes:
        format: of the record.
        source: where the float model is, as `--weights` takes it; "pack" for the pack itself.
        settings: of the calibration, as in the run's record.
        files: sha256 of every file but the card.
    """

    format: int
    source: Text
    settings: dict[str, Any]
    files: dict[str, Sha256]


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    source: Text


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Of the settings of a pack, what is read."""

    model: dict[str, Any]
    images: Count


def read_pack(folder: Path) -> PackRecord:
    """Return a pack's record, its files checked against it.

    Raises:
        CalibError, GaqError: it is not a pack, has another format, or a file is missing or altered.
    """
    mark = folder / MARK
    if not mark.is_file():
        raise GaqError(f"{folder} is not a pack: it has no {MARK}. `gaq-export pack` makes one.")
    advice = "Fetch it again, or pack the run again"
    content = read_record(dict[str, Any], mark, advice)
    # The format first: a record of another version must not be half understood.
    if (version := content.get("format")) != FORMAT:
        raise GaqError(f"{folder} is a pack of format {version}, this version reads {FORMAT}: pack the run again.")
    record = check_record(PackRecord, content, mark, advice)
    settings = check_record(_Settings, record.settings, f"{mark}, settings", advice, others=True)
    check_record(_Model, settings.model, f"{mark}, settings.model", advice, others=True)
    for name, sha256 in record.files.items():
        path = folders.inside(folder, name)  # a pack is someone else's
        if not path.is_file():
            raise GaqError(f"{folder} has no file {name}, which its {MARK} lists: fetch it again.")
        if engines.sha256_of(path) != sha256:
            raise GaqError(f"{path} is not what {MARK} says (sha256): fetch it again, or pack the run again.")
    return record


def unpack(folder: Path, run: Run) -> QuantPlan:
    """Make a run folder from a pack: its plan and settings are copied there; the float model stays where it is.

    Raises:
        GaqError, CalibError: the pack is incomplete, or the run folder holds another calibration.
    """
    record = read_pack(folder)
    plan = load_plan(folder / run.plan.name)
    source = str(folder.resolve()) if record.source == str(PACK) else record.source
    plan = replace(plan, provenance=provenance_of(plan).moved_to(WeightSource.parse(source)).to_json())
    settings = record.settings
    runs.claim(run, settings | {"model": {**settings["model"], "source": source}})
    if (conditioning := load_conditioning(provenance_of(plan), folder)) is not None:
        conditioning.save(run.folder)
    with folders.staging(run.plan) as staged:
        save_plan(plan, staged / run.plan.name)
        readable = run.plan.with_suffix(".json").name
        if run.plan.exists() and run.plan.read_bytes() != (staged / run.plan.name).read_bytes():
            raise GaqError(f"{run.folder} holds another plan than {folder}: give --run another folder.")
        # The plan last, since its presence says that the run is complete.
        for name in (readable, run.plan.name):
            os.replace(staged / name, run.folder / name)
    return plan


def float_model(folder: Path) -> tuple[str, str]:
    """Return name and source of a pack's float model, as `load_model` takes them."""
    record = read_pack(folder)
    source = str(folder.resolve()) if record.source == str(PACK) else record.source
    return str(record.settings["model"]["name"]), source


def _save_float(model: LoadedModel, folder: Path) -> None:
    """Write the float model, with the decoder, text encoders and tokenizers of its pipeline folder."""
    # diffusers finds a network by the name of its folder.
    place = "transformer" if "Transformer" in type(model.module).__name__ else "unet"
    model.module.save_pretrained(folder / place)  # type: ignore[operator]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    write_atomically(scheduler, json.dumps(dict(model.spec.scheduler), indent=1).encode())
    home = text_encoder.folder_of(model.source)
    others = [] if home is None else [home / name for name in hub.wanted(_files(home))]
    for file in others:
        copy = folder / file.parent.name / file.name
        if file.parent.name in hub.PARTS and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _evaluation(run: Run, folder: Path | None) -> Evaluation | None:
    """Return the scores of this run's engine in an evaluation.

    Raises:
        GaqError: a folder was given, and it holds no evaluation of this engine.
    """
    if folder is None and not (DEFAULT / RECORD).is_file():
        return None
    record = runs.read_record(run)
    if folder is None and not record.last("build-engine"):
        return None
    file = report.engine_of(run, record, None)
    evaluation = report.evaluation_of(folder, file)
    if evaluation is None:
        return None
    # An evaluation may compare several engines, of other plans too.
    rows = {
        name: row
        for name, row in evaluation.rows.items()
        if any(score.context.get("engine_sha256") == file.sha256 for score in row)
    }
    return replace(evaluation, rows=rows)


def _home(source: WeightSource) -> Path | None:
    """Return the folder with the source model's card and licences, None if it has no such folder."""
    if source.kind is SourceKind.HUB:
        return hub.papers(source.repository, source.commit)
    path = source.path
    return path if path is None or path.is_dir() else path.parent if path.is_file() else None


def _papers(home: Path | None) -> list[Path]:
    """Return the source model's licences."""
    files = sorted(home.iterdir()) if home is not None else []
    return [file for file in files if file.is_file() and file.name.lower().startswith(LICENCE_FILES)]


def _terms(home: Path | None, source: WeightSource) -> dict[str, str]:
    """Return the licence as the source model's card names it; {} if it says nothing."""
    if source == BUNDLED:
        return {"license": "apache-2.0"}
    path = home / CARD if home is not None else None
    if path is None or not path.is_file():
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data  # a card with a bad evaluation may name its licence
    terms = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in terms.items() if value}


def _files(folder: Path) -> list[str]:
    """Return all files in a folder and its subfolders, sorted, as relative paths with slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
