"""Read the `model_index.json` of a pipeline folder, and refuse pipelines that draw from more than noise and text.

A ControlNet, an adapter or a picture to start from would be left out here, and the images would be others than the
pipeline's. In: a pipeline folder. Out: its index, or an error that says what would be left out.
"""

from pathlib import Path
from typing import Any

from gaq_export.errors import GaqError
from gaq_export.models.json_file import read_json

NAME = "model_index.json"
# Pipelines of diffusers that are drawn here as they draw; the second name of LDMPipeline is that of its first months.
PIPELINES = (
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "LDMPipeline",
    "LatentDiffusionUncondPipeline",
    "PNDMPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
# Components that are used here, or that leave the drawing as it is.
_COMPONENTS = (
    "unet",
    "transformer",
    "scheduler",
    "vae",
    "vqvae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "feature_extractor",
    "safety_checker",
)
_LEFT_OUT = ("controlnet", "adapter", "prior", "image_encoder")  # their sub-folders tell, where there is no index


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a pipeline folder, empty if it has none.

    Raises:
        GaqError: it cannot be read, or belongs to a pipeline that is not drawn here as it draws.
    """
    file = folder / NAME
    index = read_json(file, "index of the pipeline") if file.is_file() else {}
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise GaqError(
            f"{file} describes a {kind!r}, and its control, picture or other method would be left out; supported are "
            f"{list(PIPELINES)}. If its network can also be drawn like one of those, name that in a copy of the folder."
        )
    # A component is listed as [library, class], both null if it is not there.
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    present = [name for name in _LEFT_OUT if not index and (folder / name / "config.json").is_file()]
    further = [*(name for name in listed if name not in _COMPONENTS), *present]
    if further:
        raise GaqError(
            f"The pipeline in {folder} also uses {further}, which would be left out, so other images would be drawn "
            "than it draws. Give a folder without that."
        )
    if index.get("requires_aesthetics_score"):
        raise GaqError(f"{file} describes a refiner, which goes on from another model's latents; it is not supported.")
    return index
