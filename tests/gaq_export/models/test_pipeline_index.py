"""A pipeline that draws from more than noise, classes and texts is refused, since that would be left out."""

import json
from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.models import text_encoder
from gaq_export.models.loader import load_model
from gaq_export.models.pipeline_index import NAME, read_index

UNET = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
NONE = {"image_encoder": [None, None], "safety_checker": [None, None]}


@pytest.mark.parametrize("kind", ["DDIMPipeline", "StableDiffusionPipeline", "LatentDiffusionUncondPipeline"])
def test_pipelines_that_are_drawn_alike_are_loaded(kind: str, tiny_folder: Path) -> None:
    (tiny_folder / NAME).write_text(json.dumps({"_class_name": kind, **UNET, **NONE, "requires_safety_checker": True}))
    assert load_model(weights=tiny_folder).shape == (1, 16, 16)


LEFT_OUT = "would be left out; supported are .*'StableDiffusionPipeline'"
REFUSED: list[tuple[dict[str, object], str]] = [
    *(
        ({"_class_name": f"StableDiffusion{kind}Pipeline", **UNET}, f"'StableDiffusion{kind}Pipeline', .* {LEFT_OUT}")
        for kind in ("ControlNet", "Inpaint", "Img2Img", "Adapter", "XLImg2Img", "InstructPix2Pix", "Upscale")
    ),
    ({"_class_name": ["my_pipeline", "MyPipeline"]}, LEFT_OUT),
    ({"_class_name": {"a": 1}}, LEFT_OUT),
    (
        {"_class_name": "StableDiffusionPipeline", **UNET, "image_encoder": ["transformers", "CLIPVisionModel"]},
        r"also uses \['image_encoder'\], which would be left out.*Give a folder without that",
    ),
    ({"_class_name": "StableDiffusionPipeline", "controlnet": ["diffusers", "ControlNetModel"]}, r"\['controlnet'\]"),
    ({"_class_name": "StableDiffusionXLPipeline", "requires_aesthetics_score": True}, "describes a refiner"),
]


@pytest.mark.parametrize(("index", "message"), REFUSED)
def test_what_would_be_left_out_is_named(index: dict[str, object], message: str, tiny_folder: Path) -> None:
    (tiny_folder / NAME).write_text(json.dumps(index))
    with pytest.raises(GaqError, match=message) as caught:
        load_model(weights=tiny_folder)
    assert "\n" not in str(caught.value)


def test_a_control_net_in_a_folder_without_an_index_is_named_too(tiny_folder: Path) -> None:
    assert read_index(tiny_folder) == {}
    (tiny_folder / "controlnet").mkdir()
    (tiny_folder / "controlnet" / "config.json").write_text("{}")
    with pytest.raises(GaqError, match=r"also uses \['controlnet'\]"):
        load_model(weights=tiny_folder)


def test_a_refiner_without_an_index_is_known_by_its_text_encoders(tiny_folder: Path) -> None:
    (tiny_folder / "text_encoder_2").mkdir()
    with pytest.raises(GaqError, match="has text_encoder_2/ and no text_encoder/, as a refiner of Stable Diffusion XL"):
        text_encoder.load(tiny_folder)
