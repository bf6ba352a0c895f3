"""Whatever a model, a prompt or a label is called, every page, card and config that we write shows it and obeys it not.

The pages of `compare` are in `comparison/test_pages.py`.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from calib.plan import load_plan
from engines import EngineFile
from gaq_export.errors import GaqError, visible
from gaq_export.evaluation.evaluate import Evaluation
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel
from gaq_export.report import inspection_page, report, report_page
from gaq_export.report.inspection import InspectionOptions
from gaq_export.report.markdown import code, markdown_table, plain
from gaq_export.report.report import Report, ReportOptions
from gaq_export.sharing import model_card, triton_repository
from tests.gaq_export.commands import gaq
from tests.gaq_export.hostile_names import NAMES, check_html, check_markdown
from tests.gaq_export.report import test_inspection_page
from tests.gaq_export.sharing.test_triton_repository import _file

each_name = pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])


@each_name
def test_text_in_markdown_is_shown_and_is_no_markup(name: str) -> None:
    check_markdown(lambda name: f"# {plain(name)}\n\n{plain(name)} and more\n\n- {plain(name)}\n", name)
    check_markdown(lambda name: "\n".join(markdown_table(["a", "b"], [[plain(name), "1"]])), name)
    check_markdown(lambda name: "\n".join(markdown_table(["a", "b"], [[code(name), "1"]])), name)


# Fewer, since drawing charts takes a second: text is escaped in one place, and a $ is for the charts.
few_names = pytest.mark.parametrize("name", ["</p><img src='x'>&lt;\n\u202e\x1b", "$\\frac{\\"])


@few_names
def test_inspect_shows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def page(name: str) -> str:
        monkeypatch.setattr(test_inspection_page, "NASTY", name)
        origin = inspection_page.Origin(settings={"images": 4}, journal={"step": "calibrate", "when": name})
        return inspection_page.render(test_inspection_page.small(), test_inspection_page.measured(), origin)

    check_html(page, name)


@pytest.fixture(scope="module")
def measured(tiny_run: Path, tiny_step_engine: EngineFile, tiny_model: LoadedModel, tmp_path_factory) -> Report:
    """A report of the tiny run's engine."""
    options = ReportOptions(engine=tiny_step_engine.path, rounds=0, inspection=InspectionOptions(images=1))
    return report.measure(tiny_run, tmp_path_factory.mktemp("report") / "x.html", options, model=tiny_model)


def scores_of(name: str, folder: Path) -> Evaluation:
    context = {
        "images": 9, "features": "digits", "features_sha256": "0" * 64, "reference": name, "reference_sha256": "0" * 64,
        "reference_images": 9, "floor_images": 4,
    }  # fmt: skip
    score = Score(metric="fd", name="Frechet distance", value=3.25, low=3.0, high=3.5, floor=1.0, context=context)
    return Evaluation(rows={name: [score]}, steps={}, left_out=[name], path=folder)


@few_names
def test_report_shows_it(name: str, measured: Report, tmp_path: Path) -> None:
    def page(name: str) -> str:
        metadata = json.loads(json.dumps(measured.file.metadata))
        metadata["provenance"]["model"]["name"] = name
        plan = dataclasses.replace(measured.plan, provenance=metadata["provenance"])
        changed = dataclasses.replace(
            measured,
            file=dataclasses.replace(measured.file, metadata=metadata),
            plan=plan,
            images=dataclasses.replace(measured.images, captions=(name,)),
            evaluation=scores_of(name, tmp_path),
            journal=({"step": "calibrate", "command": name},),
            not_run=name,
        )
        return report_page.render(changed)

    check_html(page, name)


@each_name
def test_a_model_card_shows_it(name: str, tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    def card(name: str) -> str:
        return model_card.render(
            model_card.Content(
                plan=load_plan(tiny_run / "plan.safetensors"),
                model=dataclasses.replace(tiny_model, spec=dataclasses.replace(tiny_model.spec, name=name)),
                settings={"images": 4},
                terms={"license": "other", "license_name": name, "license_link": name},
                evaluation=scores_of(name, tmp_path),
                files=["plan.json", name],
            )
        )

    read = ModelCard(card(name))
    assert read.data.model_name == visible(f"{name}-W4A8")
    assert (read.data.license, read.data.license_name) == ("other", visible(name))
    check_markdown(lambda name: card(name).partition("\n---\n\n")[2], name)


@each_name
def test_a_triton_repository_shows_it(name: str, tiny_step_engine: EngineFile) -> None:
    config = triton_repository.config_text("unet", _file(()), {"prompts": [name], "steps": 3})
    assert len(config.splitlines()) == len(
        triton_repository.config_text("unet", _file(()), {"a": 1, "b": 1}).splitlines()
    )
    (text,) = re.findall(r'key: "prompts" value \{ string_value: ("(?:[^"\\]|\\["\\])*") \} \}$', config, re.MULTILINE)
    assert json.loads(json.loads(text)) == [name]

    def readme(name: str) -> str:
        metadata = json.loads(json.dumps(tiny_step_engine.metadata))
        metadata["provenance"]["model"]["name"] = name
        file = dataclasses.replace(tiny_step_engine, backend="onnxruntime", metadata=metadata)
        return triton_repository._readme(SimpleNamespace(file=file, decoder=None, texts=()))

    if not name.endswith("\udcff"):  # which no record of an engine takes
        check_markdown(readme, name)


def test_a_folder_whose_name_no_record_takes_is_refused_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tiny_folder.rename(tmp_path / "half \udcff")
    words = ("calibrate", "--weights", str(folder), "--run", tmp_path / "run", "-q")
    assert gaq(*words).stderr == (
        f"error: The name of {tmp_path}/half \ufffd is no text in UTF-8, so no record can hold it: rename it.\n"
    )


def test_the_client_is_the_same_program_for_every_model() -> None:
    tree = ast.parse(triton_repository.client_text())
    assert [node.module for node in tree.body if isinstance(node, ast.ImportFrom)] == [
        "collections.abc", "pathlib", "typing", "PIL", "tritonclient.http", "tritonclient.http",
    ]  # fmt: skip


@each_name
def test_an_error_shows_it_on_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise GaqError(f"Found {name}.")

    monkeypatch.setattr("gaq_export.pipeline.inspect", fail)
    assert gaq("inspect", "-q").stderr == f"error: Found {visible(name)}.\n"
