"""The model card of a pack: what it is, how to use it, how it came about, how good it is, and on whose terms."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from calib.plan import QuantPlan
from calib.step_bits import widths
from gaq_export._version import __version__
from gaq_export.evaluation.evaluate import Evaluation
from gaq_export.evaluation.scores import Score, table
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import provenance_of
from gaq_export.models.source import SourceKind
from gaq_export.report.markdown import markdown_table

WHAT = {  # files of a pack by how their names begin
    "plan.": "the quantized layers: integers, scales, and how they came about",
    "onnx/": "whole denoising steps as one quantized ONNX graph, for other tools",
    "unet/": "the float network",
    "transformer/": "the float network",
    "scheduler/": "its noise schedule",
    "vae/": "its decoder of latents, float",
    "vqvae/": "its decoder of latents, float",
    "text_encoder": "its reader of prompts, float",
    "tokenizer": "its reader of prompts, float",
    "conditioning-": "the prompts that it was calibrated with, as the network takes them",
    "evaluation.json": "the figures below, with all that they depend on",
}


def render(
    plan: QuantPlan,
    model: LoadedModel,
    settings: Mapping[str, Any],
    terms: Mapping[str, str],
    found: Evaluation | None,
    files: Sequence[str],
) -> str:
    """Return the card: YAML front matter as the Hugging Face hub reads it, and Markdown.

    Args:
        plan: the plan.
        model: the float model it was made from.
        settings: what calibration was given.
        terms: fields of the front matter on the source model's licence, {} if it is unknown.
        found: figures, if there are any.
        files: names in the pack.
    """
    bits = f"W{_some({layer.weight_bits for layer in plan.layers.values()})}A{_some(widths(plan))}"
    repo = model.source.repository or None
    data = ModelCardData(
        base_model=repo,
        base_model_relation="quantized" if repo else None,
        library_name="gaq-export",
        pipeline_tag=_task(model),
        tags=["diffusion", "quantized", "onnx", bits],
        model_name=f"{model.spec.name}-{bits}",
        eval_results=[_result(figure, _task(model)) for figures in found.rows.values() for figure in figures]
        if found is not None
        else None,
        license=terms.get("license"),
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
    )
    parts = (
        [f"# {model.spec.name}, {bits}", "", *_about(plan, model, bits)],
        ["## Use", "", *_use()],
        ["## How it was made", "", *_made(plan, settings)],
        ["## Figures", "", *_figures(found)],
        ["## Files", "", *markdown_table(["file", "what"], _listed(files))],
        ["## Licence", "", _licence(model, repo, terms)],
    )
    body = "\n\n".join("\n".join(part) for part in parts)
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}\n"


def _about(plan: QuantPlan, model: LoadedModel, bits: str) -> list[str]:
    words = {
        SourceKind.RANDOM: "random weights",
        SourceKind.BUNDLED: "the model of that name in gaq-export",
        SourceKind.HUB: str(model.source),
    }
    source = words.get(model.source.kind, "a folder")
    lines = [
        f"{model.spec.name} (from {source}), quantized to {bits} by gaq-export {__version__}: {len(plan.layers)} "
        f"layers have integer weights and inputs, {len(plan.float_layers)} stay float; `plan.json` names them."
    ]
    return [*lines, "", "Its weights are random, so its pictures mean nothing."] if model.random_weights else lines


def _use() -> list[str]:
    return [
        "With gaq-export, in a folder of your own; FOLDER is this one:",
        "",
        "    gaq-export build-engine --weights FOLDER",
        "    gaq-export sample --engine unet.plan",
        "",
        "`EngineUNet` of gaq-export puts the engine into a diffusers pipeline.",
    ]


def _made(plan: QuantPlan, settings: Mapping[str, Any]) -> list[str]:
    config, spec = plan.config, provenance_of(plan).sampler
    lines = [
        f"sampler: {spec}",
        f"calibration: {settings['images']} images drawn by the float network, seed {config.seed}",
        f"rounding: {config.reconstruction.iterations} iterations a block, samples weighted by {config.omega.rule}",
        f"weights of the source: sha256 {provenance_of(plan).fingerprint}",
    ]
    return [f"- {line}" for line in lines]


def _figures(found: Evaluation | None) -> list[str]:
    if found is None or not found.rows:
        return ["Not evaluated."]
    context = next(iter(found.rows.values()))[0].context
    shown = [f"{name} {context[name]}" for name in ("images", "features", "reference", "seeds") if name in context]
    return [*markdown_table(*table(found.rows)), "", f"Measured by `gaq-export evaluate`: {', '.join(shown)}."]


def _listed(files: Sequence[str]) -> list[list[str]]:
    return [[f"`{name}`", next((w for start, w in WHAT.items() if name.startswith(start)), "")] for name in files]


def _licence(model: LoadedModel, repo: str | None, terms: Mapping[str, str]) -> str:
    name = terms.get("license_name") or terms.get("license")
    if name is None:
        return "The source model's licence was not found. Find out, and say so here, before you share this."
    where = f" ({repo})" if repo else ""
    return f"{name}, as the source model{where} is: what is made of it goes by its terms."


def _task(model: LoadedModel) -> str | None:
    """Return what the Hugging Face hub calls what the model does, None if it has no word for it."""
    if "encoder_hidden_states" in model.condition_inputs:
        return "text-to-image"
    return None if model.condition_inputs else "unconditional-image-generation"


def _result(figure: Score, task: str | None) -> EvalResult:
    return EvalResult(
        task_type=task or "image-generation",
        dataset_type="images",
        dataset_name=str(figure.context.get("reference", "the float network's images from the same noise")),
        metric_type=figure.metric,
        metric_name=figure.name,
        metric_value=round(figure.value, 6),
    )


def _some(numbers: Sequence[int] | set[int]) -> str:
    return "/".join(map(str, sorted(numbers)))
