"""The model card of a pack: what it is, how to use it, how it was made, its scores, and its licence.

In: `Content`. Out: Markdown with the YAML front matter that the Hugging Face hub reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from calib.plan import QuantPlan
from calib.step_bits import widths
from gaq_export._version import __version__
from gaq_export.errors import visible
from gaq_export.evaluation.evaluate import Evaluation
from gaq_export.evaluation.scores import Score, table
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import provenance_of
from gaq_export.models.source import SourceKind
from gaq_export.report.markdown import code, markdown_table, plain

WHAT = {  # files of a pack by how their names begin
    "plan.": "the quantized layers: integers, scales, and how they were calibrated",
    "onnx/": "whole denoising steps as one quantized ONNX graph, for other tools",
    "unet/": "the float network",
    "transformer/": "the float network",
    "scheduler/": "its noise schedule",
    "vae/": "its decoder of latents, float",
    "vqvae/": "its decoder of latents, float",
    "text_encoder": "its text encoder, float",
    "tokenizer": "its tokenizer",
    "conditioning-": "the prompts that it was calibrated with, encoded",
    "evaluation.json": "the scores above, with all that they depend on",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a card is about.

    Attributes:
        plan: the plan.
        model: the float model that it was made from.
        settings: what calibration was run with.
        terms: front matter about the source model's licence, {} if it is unknown.
        evaluation: scores, None if there are none.
        files: names in the pack.
    """

    plan: QuantPlan
    model: LoadedModel
    settings: Mapping[str, Any]
    terms: Mapping[str, str]
    evaluation: Evaluation | None
    files: Sequence[str]


def render(content: Content) -> str:
    """Return the card: YAML front matter as the Hugging Face hub reads it, and Markdown."""
    plan = content.plan
    model = content.model
    bits = f"W{_joined({layer.weight_bits for layer in plan.layers.values()})}A{_joined(widths(plan))}"
    parts = (
        [f"# {plain(model.spec.name)}, {bits}", "", *_about(plan, model, bits)],
        ["## Use", "", *_use()],
        ["## How it was made", "", *_calibration(plan, content.settings)],
        ["## Scores", "", *_scores(content.evaluation)],
        ["## Files", "", *markdown_table(["file", "what"], _listed(content.files))],
        ["## Licence", "", _licence(model, content.terms)],
    )
    body = "\n\n".join("\n".join(part) for part in parts)
    return f"---\n{_front_matter(content, bits).to_yaml().strip()}\n---\n\n{body}\n"


def _front_matter(content: Content, bits: str) -> ModelCardData:
    """Return the fields by which the hub lists and searches models."""
    model = content.model
    terms = {name: visible(str(term)) for name, term in content.terms.items()}
    repository = _repository(model)
    task = _task(model)
    rows = {} if content.evaluation is None else content.evaluation.rows
    return ModelCardData(
        base_model=repository and visible(repository),
        # The hub then lists the pack among the source model's quantizations; without a base there is no relation.
        base_model_relation="quantized" if repository else None,
        library_name="gaq-export",
        pipeline_tag=task,
        tags=["diffusion", "quantized", "onnx", bits],
        model_name=visible(f"{model.spec.name}-{bits}"),
        # Only with model_name, which the hub's client requires beside results.
        eval_results=[_result(score, task) for row in rows.values() for score in row] or None,
        license=terms.get("license"),
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
    )


def _repository(model: LoadedModel) -> str | None:
    return model.source.repository if model.source.kind is SourceKind.HUB else None


def _about(plan: QuantPlan, model: LoadedModel, bits: str) -> list[str]:
    words = {
        SourceKind.RANDOM: "random weights",
        SourceKind.BUNDLED: "the model of that name in gaq-export",
        SourceKind.HUB: plain(str(model.source)),
    }
    source = words.get(model.source.kind, "a folder")
    name = plain(model.spec.name)
    lines = [
        f"{name} (from {source}), quantized to {bits} by gaq-export {__version__}: {len(plan.layers)} "
        f"layers have integer weights and inputs, {len(plan.float_layers)} stay float; `plan.json` names them."
    ]
    return [*lines, "", "Its weights are random, so its pictures mean nothing."] if model.random_weights else lines


def _use() -> list[str]:
    return [
        "With gaq-export, in any folder; FOLDER is this one:",
        "",
        "    gaq-export build-engine --weights FOLDER",
        "    gaq-export sample --engine unet.plan",
        "",
        "`EngineUNet` of gaq-export puts the engine into a diffusers pipeline.",
    ]


def _calibration(plan: QuantPlan, settings: Mapping[str, Any]) -> list[str]:
    config = plan.config
    spec = provenance_of(plan).sampler
    lines = [
        f"sampler: {spec}",
        f"calibration: {settings['images']} images drawn by the float network, seed {config.seed}",
        f"rounding: {config.reconstruction.iterations} iterations a block, samples weighted by {config.omega.rule}",
        f"weights of the source: sha256 {provenance_of(plan).fingerprint}",
    ]
    return [f"- {line}" for line in lines]


def _scores(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None or not evaluation.rows:
        return ["Not evaluated."]
    # All rows of a table share what is listed here, else `table` raises.
    context = next(iter(evaluation.rows.values()))[0].context
    known = [name for name in ("images", "features", "reference", "seeds") if name in context]
    shown = [f"{name} {plain(str(context[name]))}" for name in known]
    head, rows = table(evaluation.rows)
    named = [[plain(row[0]), *row[1:]] for row in rows]  # after a folder or an engine
    return [*markdown_table(head, named), "", f"Measured by `gaq-export evaluate`: {', '.join(shown)}."]


def _listed(files: Sequence[str]) -> list[list[str]]:
    # The first entry that fits; a licence file has no words, since its name says what it is.
    return [[code(name), next((w for start, w in WHAT.items() if name.startswith(start)), "")] for name in files]


def _licence(model: LoadedModel, terms: Mapping[str, str]) -> str:
    name = terms.get("license_name") or terms.get("license")
    if name is None:
        return "The source model's licence was not found. Find it, and name it here, before you share this."
    repository = _repository(model)
    where = f" ({plain(repository)})" if repository else ""
    return f"{plain(str(name))}, as the source model{where} is: its terms apply to what is made from it."


def _task(model: LoadedModel) -> str | None:
    """Return the Hugging Face hub's name of the model's task, None if it has none."""
    if "encoder_hidden_states" in model.condition_inputs:
        return "text-to-image"
    return None if model.condition_inputs else "unconditional-image-generation"


def _result(score: Score, task: str | None) -> EvalResult:
    return EvalResult(
        task_type=task or "image-generation",
        dataset_type="images",
        dataset_name=visible(str(score.context.get("reference", "the float network's images from the same noise"))),
        metric_type=score.metric,
        metric_name=score.name,
        metric_value=round(score.value, 6),
    )


def _joined(numbers: Sequence[int] | set[int]) -> str:
    return "/".join(map(str, sorted(numbers)))
