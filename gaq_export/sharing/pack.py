"""A finished calibration as one folder to share, in Hugging Face layout, and back.

    README.md, LICENSE ...          a model card; the licences of the source model
    plan.safetensors, plan.json     the quantized layers, and texts, if such are what it was calibrated with
    onnx/unet.step.<profile>.onnx   whole denoising steps, quantized, for other tools
    unet/ or transformer/, scheduler/, vae/, text_encoder/ ...    the float model
    evaluation.json                 figures, if there are any
    pack.json                       the calibration's settings, where the float model is, and the sha256 of every file
                                    but the card, which people may edit

A plan has no biases, no norms, and nothing of the layers that stay float, and an engine is checked on what the float
network draws; so to build from a pack, the float model is needed. If it is bundled with the tool, made by a seed, or
pinned on the hub, the pack says where it is; otherwise it holds it, whole, so that its fingerprint stays what the plan
says.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCard

import engines
from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan, save_plan
from gaq_export import run as runs
from gaq_export.deploy.onnx_artifact import export_onnx
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
MARK, CARD = "pack.json", "README.md"
FOLDER = "pack"  # inside the run folder
PAPERS = ("license", "licence", "copying", "notice")  # how the names of such files begin


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A pack that was written: `whole` if the float model is inside, `licence` as the Hugging Face hub names it."""

    folder: Path
    size_bytes: int
    whole: bool
    licence: str | None


def write_pack(
    run: Run,
    out: Path | None = None,
    *,
    whole: bool = False,
    licence: str | None = None,
    judged: Path | None = None,
    profile: str = "reference",
    model: LoadedModel | None = None,
) -> Pack:
    """Write a pack of a run.

    Args:
        run: with a finished plan.
        out: the folder; `pack` in the run folder if None. A pack that is there is replaced.
        whole: with the float model, even where it could be found again.
        licence: of the source model, by its name on the Hugging Face hub; what its card says if None.
        judged: folder of `evaluate`; the usual one if None, and if it is about this run's engine.
        profile: of the ONNX file.
        model: the float model; found again from the plan if None.

    Raises:
        GaqError, CalibError: no plan, another model, one that cannot be loaded again, or a place that is taken.
    """
    plan, settings = load_plan(run.plan), runs.read_record(run).settings
    model, out = find_model(provenance_of(plan), model, run.folder), out or run.folder / FOLDER
    runs.check_replaceable(out, MARK)
    whole = whole or not model.source.public
    if whole and (model.source == MODULE or type(model.module) not in ARCHITECTURES):
        raise GaqError(f"{model.spec.name!r} is a module of your own, which nobody else could load: it is not packed.")
    found, source = _evaluation(run, judged), str(PACK if whole else model.source)
    home = _home(model.source)
    terms = _terms(home, model.source) if licence is None else {"license": licence}
    with runs.staging(out) as staged:
        made = staged / FOLDER
        save_plan(
            replace(plan, provenance=provenance_of(plan).moved_to(WeightSource.parse(source)).to_json()),
            made / run.plan.name,
        )
        if model.conditioning is not None:
            model.conditioning.save(made)
        export_onnx(profile, folder=run.folder, model=model, out=made / "onnx" / run.onnx(profile, "step").name)
        if whole:
            _save_float(model, made)
        for paper in _papers(home):
            shutil.copyfile(paper, made / paper.name)
        if found is not None:
            shutil.copyfile(found.path, made / RECORD)
        text = model_card.render(plan, model, settings, terms, found, sorted(_files(made)))
        write_atomically(made / CARD, text.encode())
        record = {
            "format": FORMAT,
            "source": source,
            "settings": settings | {"model": {**settings["model"], "source": source}},
            "files": {name: engines.sha256_of(made / name) for name in sorted(_files(made)) if name != CARD},
        }
        write_atomically(made / MARK, json.dumps(record, indent=1).encode())
        size = sum((made / name).stat().st_size for name in _files(made))
        runs.replace_folder(made, out)
    runs.add_entry(run, "pack", folder=os.path.relpath(out, run.folder), bytes=size, whole=whole)
    return Pack(folder=out, size_bytes=size, whole=whole, licence=terms.get("license"))


def read_pack(folder: Path) -> dict[str, Any]:
    """Return a pack's record, its files checked against it.

    Raises:
        GaqError: it is no pack, of another format, or a file is missing or altered.
    """
    try:
        record: dict[str, Any] = json.loads((folder / MARK).read_text(encoding="utf-8"))
        form, files = record["format"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GaqError(
            f"{folder} is no pack: its {MARK} cannot be read ({error!r}). `gaq-export pack` makes one."
        ) from error
    if form != FORMAT:
        raise GaqError(f"{folder} is a pack of format {form}, this version reads {FORMAT}: pack the run again.")
    for name, sha256 in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
            raise GaqError(f"{folder} has no file {name}, of which its {MARK} tells: fetch it again.")
        if engines.sha256_of(folder / path) != sha256:
            raise GaqError(f"{folder / path} is not what {MARK} says (sha256): fetch it again, or pack the run again.")
    return record


def unpack(folder: Path, run: Run) -> QuantPlan:
    """Make a run of a pack: its plan and settings go to the run folder; the float model stays where it is.

    Raises:
        GaqError, CalibError: it is no whole pack, or the run folder holds another calibration.
    """
    record, plan = read_pack(folder), load_plan(folder / run.plan.name)
    source = str(folder.resolve()) if record["source"] == str(PACK) else record["source"]
    plan = replace(plan, provenance=provenance_of(plan).moved_to(WeightSource.parse(source)).to_json())
    settings = record["settings"]
    runs.claim(run, settings | {"model": {**settings["model"], "source": source}})
    if (conditioning := load_conditioning(provenance_of(plan), folder)) is not None:
        conditioning.save(run.folder)
    with runs.staging(run.plan) as staged:
        save_plan(plan, staged / run.plan.name)
        readable = run.plan.with_suffix(".json").name
        if run.plan.exists() and run.plan.read_bytes() != (staged / run.plan.name).read_bytes():
            raise GaqError(f"{run.folder} holds another plan than {folder}: give --run another folder.")
        for name in (readable, run.plan.name):
            os.replace(staged / name, run.folder / name)
    return plan


def float_model(folder: Path) -> tuple[str, str]:
    """Return name and source of a pack's float model, as `load_model` takes them."""
    record = read_pack(folder)
    source = str(folder.resolve()) if record["source"] == str(PACK) else str(record["source"])
    return str(record["settings"]["model"]["name"]), source


def _save_float(model: LoadedModel, folder: Path) -> None:
    """Write the float model, and with it what its folder has to decode latents and to read prompts."""
    place = "transformer" if "Transformer" in type(model.module).__name__ else "unet"
    model.module.save_pretrained(folder / place)  # type: ignore[operator]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    write_atomically(scheduler, json.dumps(dict(model.spec.scheduler), indent=1).encode())
    home = text_encoder.folder_of(model.source)
    beside = [] if home is None else [home / name for name in hub.wanted(_files(home))]
    for file in beside:
        copy = folder / file.parent.name / file.name
        if file.parent.name in hub.PARTS and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _evaluation(run: Run, judged: Path | None) -> Evaluation | None:
    """Return figures of this run's engine; raise GaqError if they were asked for and there are none."""
    if judged is None and not (DEFAULT / RECORD).is_file():
        return None
    record = runs.read_record(run)
    if judged is None and not record.last("build-engine"):
        return None
    file = report.engine_of(run, record, None)
    found = report.evaluation_of(judged, file)
    if found is None:
        return None
    own = {n: f for n, f in found.rows.items() if any(x.context.get("engine_sha256") == file.sha256 for x in f)}
    return replace(found, rows=own)


def _home(source: WeightSource) -> Path | None:
    """Return the folder with the source model's card and licences, None if there is none to be had."""
    if source.kind is SourceKind.HUB:
        return hub.papers(source.repository, source.commit)
    path = source.path
    return path if path is None or path.is_dir() else path.parent if path.is_file() else None


def _papers(home: Path | None) -> list[Path]:
    """Return the source model's licences."""
    files = sorted(home.iterdir()) if home is not None else []
    return [file for file in files if file.is_file() and file.name.lower().startswith(PAPERS)]


def _terms(home: Path | None, source: WeightSource) -> dict[str, str]:
    """Return the licence as the source model's card names it; {} if it says nothing."""
    if source == BUNDLED:
        return {"license": "apache-2.0"}
    path = home / CARD if home is not None else None
    if path is None or not path.is_file():
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in found.items() if value}


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
