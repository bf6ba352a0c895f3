"""The model card: front matter that the hub reads, scores, files and licence of what is in the pack."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from calib.plan import load_plan
from gaq_export.evaluation.evaluate import Evaluation
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel
from gaq_export.models.source import WeightSource
from gaq_export.sharing.model_card import Content, render

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def content(tiny_run: Path, tiny_model: LoadedModel) -> Content:
    plan = load_plan(tiny_run / "plan.safetensors")
    files = ["evaluation.json", "plan.json", "plan.safetensors", "unet/config.json"]
    return Content(plan=plan, model=tiny_model, settings={"images": 4}, terms={}, evaluation=None, files=files)


def test_a_card_says_what_was_quantized_and_how(content: Content) -> None:
    card = ModelCard(render(content))
    assert card.data.tags == ["diffusion", "quantized", "onnx", "W4A8"]
    assert card.data.model_name == "tiny-W4A8"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert f"{len(content.plan.layers)} layers have integer weights and inputs" in card.text
    assert "calibration: 4 images drawn by the float network, seed 0" in card.text
    assert "Not evaluated." in card.text
    assert "| `unet/config.json` | the float network |" in card.text


def test_a_card_without_a_licence_asks_for_one(content: Content) -> None:
    assert "licence was not found. Find it, and name it here, before you share this." in render(content)
    card = ModelCard(render(dataclasses.replace(content, terms={"license": "other", "license_name": "mine"})))
    assert (card.data.license, card.data.license_name) == ("other", "mine")
    assert "mine, as the source model is" in card.text


def test_a_model_of_the_hub_is_named_as_the_base(content: Content) -> None:
    source = WeightSource.parse(f"hub:google/tiny@{COMMIT}")
    model = dataclasses.replace(content.model, source=source)
    card = ModelCard(render(dataclasses.replace(content, model=model)))
    assert (card.data.base_model, card.data.base_model_relation) == ("google/tiny", "quantized")


def test_scores_are_in_the_table_and_in_the_front_matter(content: Content, tmp_path: Path) -> None:
    context = {"images": 9, "features": "digits", "reference": "mnist.npz"}
    score = Score(metric="fd", name="Frechet distance", value=3.25, low=3.0, high=3.5, floor=1.0, context=context)
    evaluation = Evaluation(rows={"unet": [score]}, steps={}, left_out=[], path=tmp_path)
    card = ModelCard(render(dataclasses.replace(content, evaluation=evaluation)))
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("Frechet distance", 3.25, "mnist.npz")
    assert "| unet | 3.25 [3, 3.5], floor 1 |" in card.text
    assert "images 9, features digits, reference mnist.npz" in card.text
