"""What a plan and an engine file say of the model they came from, and how to find it again from that."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from calib.plan import QuantPlan
from calib.surgery import apply_surgery
from gaq_export.diffusion.conditioning import Conditioning
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.architectures import class_rows
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.source import MODULE


def describe(model: LoadedModel, spec: SamplerSpec) -> dict[str, Any]:
    """Return what a plan and an engine say of the model and its sampler."""
    schedule, conditioning = model.schedule, model.conditioning
    architecture = getattr(model.module, "config", model.spec.config)
    further: dict[str, Any] = {} if conditioning is None else {"conditions": conditioning.to_json()}
    if model.decoder is not None:
        further["decoder"] = describe_decoder(model)
    return further | {
        "model": {
            "name": model.spec.name,
            "source": str(model.source),
            "fingerprint": model.fingerprint,
            "shape": list(model.shape),
            "classes": class_rows(model.module),
            "meaningless": model.random_weights,
        },
        "architecture": json.loads(json.dumps({k: v for k, v in architecture.items() if not k.startswith("_")})),
        "sampler": asdict(spec),
        "schedule": {
            "alpha_bar": schedule.alpha_bar.tolist(),
            "clip": schedule.clip,
            "variance": schedule.variance,
            "last": schedule.last,
        },
    }


def describe_decoder(model: LoadedModel) -> dict[str, Any]:
    """Return where a model's decoder was found, and the sha256 of its weights."""
    assert model.decoder is not None
    return {"source": str(model.source), "fingerprint": fingerprint(model.decoder)}


def schedule_of(about: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule that `describe` wrote down, to the bit."""
    fields = about["schedule"]
    alpha_bar = torch.tensor(fields["alpha_bar"], dtype=torch.float64)
    last = fields.get("last", 1.0)
    return NoiseSchedule(alpha_bar=alpha_bar, clip=fields["clip"], variance=fields["variance"], last=last)


def conditioning_of(about: Mapping[str, Any], folder: Path) -> Conditioning | None:
    """Return what images are told, None if that is nothing; `folder` is the plan's or the engine file's."""
    kept = about.get("conditions")
    return None if kept is None else Conditioning.from_json(kept, folder)


def shape_of(about: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W)."""
    channels, height, width = about["model"]["shape"]
    return channels, height, width


def architecture_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network's config: all of it if it is one of diffusers', else its channels and image size."""
    channels, height, width = shape_of(about)
    size = height if height == width else [height, width]
    known: dict[str, Any] = about.get("architecture", {})
    return {"in_channels": channels, "out_channels": channels, "sample_size": size} | known


def model_of(about: Mapping[str, Any], model: LoadedModel | None, folder: Path) -> LoadedModel:
    """Return the float model that `about` describes, told the same; raise GaqError if it is not to be had.

    Args:
        about: what a plan or an engine file says.
        model: the model; found again if None.
        folder: the plan's or the engine file's.
    """
    wanted = about["model"]
    if model is None:
        if wanted["source"] == str(MODULE):
            raise GaqError(f"{wanted['name']!r} is a module of your own: call this from Python with model=wrap(...).")
        model = load_model(wanted["name"], wanted["source"])
    if model.fingerprint != wanted["fingerprint"]:
        raise GaqError(
            f"This plan belongs to another model: it was made from {wanted['name']} with weights "
            f"{wanted['fingerprint'][:12]}, found {model.spec.name} with {model.fingerprint[:12]}. Calibrate again."
        )
    decoder = about.get("decoder")
    if decoder is not None and (model.decoder is None or fingerprint(model.decoder) != decoder["fingerprint"]):
        found = "another" if model.decoder is not None else "none"
        raise GaqError(
            f"{wanted['name']} was calibrated with a decoder of latents, weights {decoder['fingerprint'][:12]}, from "
            f"{decoder['source']}; found {found} with this model. Calibrate again, in another run folder."
        )
    return replace(model, conditioning=conditioning_of(about, folder))


def rewritten(model: LoadedModel, plan: QuantPlan) -> LoadedModel:
    """Return the model with its network as the plan's layers name it; the one it has if the plan rewrites nothing."""
    network = apply_surgery(model.network, plan.surgery)
    return model if network is model.network else replace(model, module=network)
