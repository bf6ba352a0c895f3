"""One HTML page out of an `Inspection`: every figure with how to read it and the numbers behind it.

The page opens offline and never changes: styles and figures are inside, and it runs no script. All text that comes
from a plan, a record or a model is escaped where it enters the page.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calib import config as configs
from calib.diagnose import Agreement, Alignment, bin_means, spearman
from calib.plan import QuantPlan
from calib.reconstruct import BlockResult
from gaq_export._version import __version__
from gaq_export.models.provenance import provenance_of
from gaq_export.quantize.noise_sqnr import NoiseSqnr
from gaq_export.report import charts, html
from gaq_export.report.inspection import Inspection, LayerRange

LISTED = 12  # classes or prompts; of more, the last one too


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run folder's record of the calibration: its settings, and its line in the journal."""

    settings: Mapping[str, Any]
    journal: Mapping[str, Any]


def render(plan: QuantPlan, inspection: Inspection, origin: Origin) -> str:
    """Return the whole page; the same plan, numbers and record give the same text."""
    name = title(plan)
    header = html.header("Looking inside a calibration", name, warning(plan), what_was_done(plan, inspection, origin))
    return html.document(f"{name}: inside the calibration", header, sections(plan, inspection))


def title(plan: QuantPlan) -> str:
    """Return the model's name and the bits."""
    return f"{provenance_of(plan).name}, W{plan.config.weight.bits}A{plan.config.activation.bits}"


def warning(plan: QuantPlan) -> str:
    """Return what a reader must know first, or ""."""
    return "The weights are random: every figure is about noise." if provenance_of(plan).random_weights else ""


def what_was_done(plan: QuantPlan, inspection: Inspection, origin: Origin) -> str:
    """Return the calibration's facts and all its settings, HTML."""
    facts = _facts(plan, inspection, origin) | _journal_facts(origin.journal)
    # Folded away: a reader who repeats the calibration needs every setting, others need none.
    lines = json.dumps(configs.to_json(plan.config), indent=1).splitlines()
    settings = "\n".join(map(html.escape, lines))
    return f"{html.facts(facts)}<details><summary>All settings</summary><pre>{settings}</pre></details>\n"


def sections(plan: QuantPlan, inspection: Inspection) -> tuple[str, ...]:
    """Return the sections about the calibration, HTML."""
    return (
        _agreement_section(plan, inspection),
        _alignment_section(inspection),
        _losses_section(plan.blocks),
        _noise_section(inspection.noise),
        _sensitivity_section(inspection.sensitivity),
        _ranges_section(inspection.ranges),
    )


def _facts(plan: QuantPlan, inspection: Inspection, origin: Origin) -> dict[str, str]:
    config = plan.config
    provenance = provenance_of(plan)
    sampler = provenance.sampler
    fit = config.reconstruction
    omega = config.omega
    eta = f", eta {sampler.eta:g}" if sampler.eta else ""
    patterns = "".join(f", {pattern}" for pattern in config.keep_float)
    learned = f"{omega.rule}, {_count(omega.meta_steps, 'meta-step')} a block, temperature {omega.temperature:g}"
    return {
        "model": f"{provenance.name} ({provenance.source}), weights {provenance.fingerprint[:12]}",
        "bits": f"{config.weight.bits}-bit weights, {config.activation.bits}-bit activations",
        "sampler": f"{sampler.name}, {sampler.steps} steps, {sampler.spacing} spacing{eta}",
        **_conditioning_facts(plan),
        "samples": f"{origin.settings['images']} images; {inspection.train} training and {inspection.validation} "
        "validation samples for the weights",
        "rounding": f"{fit.iterations} iterations a block, batch {fit.batch}, learning rate {fit.learning_rate:g}",
        "sample weights": omega.rule if omega.rule == "uniform" else learned,
        "layers": f"{len(plan.layers)} quantized, {len(plan.float_layers)} float ({config.convention}{patterns})",
        "blocks": f"{len(plan.blocks)}, {sum(b.rounding == 'nearest' for b in plan.blocks)} of them rounded to nearest",
        "seed": f"{config.seed}",
    }


def _conditioning_facts(plan: QuantPlan) -> dict[str, str]:
    """Return what images are conditioned on, if anything."""
    conditioning = provenance_of(plan).conditioning
    if conditioning is None:
        return {}
    names = conditioning["names"]
    # The names of a thousand classes would fill the page.
    names = names if len(names) <= LISTED else [*names[:LISTED], "...", names[-1]]
    guidance = "no guidance" if conditioning["guidance"] == 1 else f"guidance {conditioning['guidance']:g}"
    return {"conditioning": f"{', '.join(names)}; {guidance}"}


def _journal_facts(journal: Mapping[str, Any]) -> dict[str, str]:
    """Return what the journal says about the calibration, then the versions in use then and now."""
    labels = {
        "when": "finished",
        "collect_seconds": "collecting",
        "seconds": "calibrating",
        "phase_seconds": "of which",
        "peak_memory_mib": "peak memory, MiB",
    }
    # A key without a label, of another version of this tool, is shown by its name.
    facts = {
        labels.get(key, key.replace("_", " ")): f"{_listed(value)} s" if key.endswith("seconds") else f"{value}"
        for key, value in journal.items()
        if key not in ("step", "version", "command", "packages")
    }
    versions = f"gaq-export {journal.get('version', 'unknown')}; this page: gaq-export {__version__}"
    return {**facts, "made with": f"{versions}, torch {torch.__version__}"}


def _listed(value: Any) -> str:
    """Write a number, or a table of them, in one line."""
    return ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, Mapping) else f"{value}"


def _agreement_section(plan: QuantPlan, inspection: Inspection) -> str:
    title = "Do the sampling steps pull the same way?"
    shown = inspection.agreement
    if shown is None:
        return html.section(title, html.note("No block of this plan can be measured alone."))
    block = next(b for b in plan.blocks if b.name == shown.block)
    text = (
        "Each cell compares two sampling steps: the cosine similarity of their gradients of the block loss with "
        "respect to the block's dequantized weights. Blue: both would move the weights the same way; red: opposite "
        "ways; white: neither. Learning uses up what the steps have in common, so paler on the right is to be expected."
    )
    numbers = (
        f"Block {html.code(shown.block)}, {_count(len(block.layers), 'layer')}; {inspection.train} training samples, "
        f"{shown.samples} at each of {_count(len(shown.steps), 'step')}; inputs from the quantized layers "
        f"before it, targets from the float block. Mean of the cells off the diagonal: {_cosine(shown.before.between)} "
        f"before, {_cosine(shown.after.between)} after. For comparison: the two halves of "
        f"one step's samples have {_cosine(shown.before.halves)} before and {_cosine(shown.after.halves)} after."
    )
    return html.section(
        title, html.text(text), html.figure(charts.cosines(shown), numbers), _overview(inspection.overview, shown.block)
    )


def _overview(rows: Sequence[Agreement], chosen: str) -> str:
    table = html.table(
        ("block", "steps, before", "halves, before", "steps, after", "halves, after"),
        [(a.block, *(_cosine(v) for c in (a.before, a.after) for v in (c.between, c.halves))) for a in rows],
        marked=chosen,
    )
    # Blocks may have fewer samples than FEW at a step, where the calibration set is small.
    fewest = _count(min(a.samples for a in rows), "sample")
    text = (
        f"Every block the same way, with {fewest} a step: mean cosine of two steps' gradients, and of the two halves "
        "of one step's samples; the fewer the samples, the lower both. <code>--block NAME</code> draws another."
    )
    return f'<p class="numbers">{text}</p>\n{table}'


def _alignment_section(inspection: Inspection) -> str:
    title = "Do the sample weights follow the gradients?"
    shown = inspection.alignment
    if shown is None:
        same = f"The sample weights are uniform: all {inspection.train} scores are equal, so there is nothing to sort."
        return html.section(title, html.note(same))
    text = (
        "Training samples sorted by their weight, omega (the softmax of the plan's scores), and cut into bins, one "
        "point a bin. Where points rise to the right, samples whose gradient agrees with the validation samples' "
        "weigh more."
    )
    return html.section(title, html.text(text), html.figure(charts.alignment(shown), _alignment_numbers(shown)))


def _alignment_numbers(shown: Alignment) -> str:
    relative = shown.omega * len(shown.omega)  # 1 where a sample weighs as much as on average
    bins = bin_means(shown.omega, [relative, shown.inner], charts.BINS)
    return (
        f"Block {html.code(shown.block)}, gradients with respect to its rounding logits at their start; "
        f"{len(relative)} training samples in {len(bins[0])} bins, {shown.validation} validation samples. Weights from "
        f"{float(relative.min()):.4f} to {float(relative.max()):.4f} times uniform, {len(torch.unique(relative))} "
        f"different ones; they are the last block's, having passed through all. Spearman's rank correlation "
        f"{_cosine(spearman(shown.omega, shown.inner))} (n = {len(relative)} samples); between the bins' means "
        f"{_cosine(spearman(*bins))} (n = {len(bins[0])}), usually larger, since averaging removes noise."
    )


def _losses_section(blocks: Sequence[BlockResult]) -> str:
    title = "What did learning the rounding gain?"
    measured = [b for b in blocks if b.loss_before is not None and b.loss_after is not None]
    if not measured:
        return html.section(title, html.note("The plan holds no block losses: every layer is rounded to nearest."))
    text = (
        "The mean block loss over the training samples with nearest rounding (open) and with the learned rounding "
        "(filled), blocks in network order, on a logarithmic scale. A cross marks a block where learning did not beat "
        "nearest, so that nearest was kept."
    )
    # Ratios, since losses of blocks differ by orders of magnitude and a mean would be the largest block's.
    ratios = [b.loss_after / b.loss_before for b in measured if b.loss_before and b.loss_after is not None]
    nearest = sum(b.rounding == "nearest" for b in measured)
    ratio = f" The loss after is {statistics.median(ratios):.2f} of the loss before (median block)." if ratios else ""
    unmeasured = [b.name for b in blocks if b not in measured]
    rest = f" Not in the figure, rounded to nearest: {', '.join(map(html.code, unmeasured))}." if unmeasured else ""
    numbers = f"{_count(len(measured), 'block')}; {nearest} kept nearest.{ratio}{rest}"
    return html.section(title, html.text(text), html.figure(charts.losses(measured), numbers))


def _noise_section(noise: NoiseSqnr) -> str:
    text = (
        "The quantized network runs beside the float one along trajectories that the float one draws; at each sampling "
        "step, the power of the float noise prediction over that of the difference. Higher is closer: 20 dB is a "
        "difference of a tenth. Lines are the median image, bands reach from the lowest to the highest."
    )
    steps, images = noise.both.shape  # (S, N)
    weights, both = (torch.quantile(v.double(), 0.5, dim=1) for v in (noise.weights, noise.both))
    worst = int(both.argmin())  # by the median image, like the line in the chart
    numbers = (
        f"{_count(images, 'image')} from seeds that calibration did not use, {_count(steps, 'step')}. Median over the "
        f"steps: {float(weights.median()):.1f} dB with rounded weights, {float(both.median()):.1f} dB with rounded "
        f"activations too; lowest {float(both[worst]):.1f} dB, at step {worst} (t = {int(noise.t[worst])})."
    )
    section = html.figure(charts.plan_sqnr(noise), numbers)
    return html.section("How close is the predicted noise?", html.text(text), section)


def _sensitivity_section(errors: Mapping[str, float]) -> str:
    text = (
        "Each layer alone is quantized, weights and input, and all others stay float: the power of the error of the "
        "predicted noise, as a share of the noise's. Layers in network order, on a logarithmic scale. A few layers to "
        "the far right are worth more bits, or --keep-float."
    )
    order = sorted(errors, key=lambda name: -errors[name])
    whole = sum(errors.values())
    most = ", ".join(f"{html.code(name)} {errors[name]:.2e}" for name in order[:3])
    # Errors of layers quantized alone add up only roughly, but well enough to say where most of it comes from.
    share = sum(errors[name] for name in order[:3]) / whole if whole else 0.0
    numbers = (
        f"{_count(len(errors), 'layer')}. The most: {most}; {100 * share:.0f} % of the sum of all, which is "
        f"{whole:.2e} ({-10 * math.log10(whole):.1f} dB)."
        if whole
        else f"{_count(len(errors), 'layer')}, none with an error."
    )
    return html.section(
        "Which layers cost the most?", html.text(text), html.figure(charts.sensitivity(errors), numbers)
    )


def _ranges_section(layers: Sequence[LayerRange]) -> str:
    text = (
        "Layers in network order. Left: the share of max|w| that an output channel's grid covers (its scale times the "
        "largest code), the dot for the median channel, the line from the least to the most; left of 1 the largest "
        "positive weights are clipped. Right: the largest input that the layer's activation grid reaches (its scale "
        "times the largest code); what exceeds it is clipped."
    )
    covered = [layer.covered[1] for layer in layers]
    reach = [layer.input_reach for layer in layers]
    numbers = (
        f"{_count(len(layers), 'layer')}, {sum(layer.channels for layer in layers)} channels. From layer to layer, "
        f"the median channel's grid covers {min(covered):.2f} to {max(covered):.2f}, and the input's reaches "
        f"{min(reach):.3g} to {max(reach):.3g}."
    )
    table = html.table(
        ("layer", "channels", "weight bits", "least", "median", "most", "input bits", "largest input"),
        [
            (
                layer.name,
                f"{layer.channels}",
                f"{layer.weight_bits}",
                *(f"{share:.3f}" for share in layer.covered),
                f"{layer.input_bits}",
                f"{layer.input_reach:.4g}",
            )
            for layer in layers
        ],
    )
    details = f"<details><summary>The numbers, layer by layer</summary>\n{table}</details>\n"
    return html.section(
        "How far do the grids reach?", html.text(text), html.figure(charts.ranges(layers), numbers), details
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cosine(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.3f}"
