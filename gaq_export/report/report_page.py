"""One HTML page out of a `Report`, for whoever decides whether the engine is good enough; it opens offline."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from calib.records import check_record
from gaq_export.deploy.float_timing import against_float
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.schedule import timesteps
from gaq_export.evaluation import scores
from gaq_export.evaluation.scores import Score, ShownContext
from gaq_export.images import encode_side_by_side, psnr
from gaq_export.quantize.noise_sqnr import FLOAT
from gaq_export.report import charts, html, inspection_page
from gaq_export.report.markdown import machine
from gaq_export.report.report import PYTORCH, Report
from gaq_export.run import command_and_versions

GAIN = 4  # differences are shown this many times as large
LITTLE = 5000  # bytes; types with fewer are not listed


def render(report: Report) -> str:
    """Return the whole page."""
    name = f"{record_of(report.file).provenance.name}, {record_of(report.file).bits}, {report.file.backend}"
    header = html.header(
        "From floating point to an engine",
        name,
        inspection_page.warning(report.plan),
        html.facts(_in_short(report)),
        f"<details><summary>How it was calibrated</summary>\n"
        f"{inspection_page.what_was_done(report.plan, report.inspection, report.origin)}</details>\n",
    )
    sections = (
        _pictures_section(report),
        _evaluation_section(report),
        _noise_section(report),
        _sizes_section(report),
        _audit_section(report),
        _speed_section(report),
        *inspection_page.sections(report.plan, report.inspection),
        _reproduction_section(report),
    )
    return html.document(f"{name}: report", header, sections)


def _in_short(report: Report) -> dict[str, str]:
    ours, exact = report.sizes
    # Medians and minima: a mean of decibels would be the best images'.
    decibels = psnr(report.images.quantized, report.images.exact)
    noise = report.noise[FLOAT]
    verdict = report.verdict
    facts = {
        "verdict": verdict.line + (f". {verdict.warning}" if verdict.poor else ""),
        "pictures": f"PSNR against float {float(decibels.median()):.1f} dB, lowest {float(decibels.min()):.1f} dB, of "
        f"{len(decibels)} from the same noise",
        "noise": f"{scores.mean_db(noise):.1f} dB SQNR, mean of {len(noise)} steps; lowest {min(noise):.1f} dB",
        "size": f"{_mb(sum(ours.weights.values()))} of weights, {_mb(sum(exact.weights.values()))} in float: "
        f"{sum(exact.weights.values()) / sum(ours.weights.values()):.1f} times smaller",
    }
    if report.speed is not None:
        _, by_exact, by_engine = (report.speed.median(who) for who in report.speed.seconds)
        facts["speed"] = f"{against_float(by_engine, by_exact)}: {_seconds(report.speed.seconds)}"
    # By the audit, not by the plan: a runtime may have fallen back to floats.
    done = sum(count for (_, how), count in report.file.audit.counts.items() if how in ("int8", "float8"))
    return facts | {"arithmetic": f"{done} of {len(report.file.audit.kernels)} weight layers in integers or FP8"}


def _pictures_section(report: Report) -> str:
    images = report.images
    who = (
        "The engine"
        if report.not_run is None
        else f"The plan in PyTorch (the engine cannot run here: {report.not_run})"
    )
    text = (
        f"Each picture three times, from the same noise: by the float network, quantized, and the difference, {GAIN} "
        f"times as large, with grey for none. {who} draws in {len(report.noise[FLOAT])} steps. A picture "
        "can be as good and yet another one: a low PSNR says that it differs, not that it is worse."
    )
    # An unconditional model has no captions.
    captions = [f", {name}" for name in images.captions] or [""] * len(images.seeds)
    near = psnr(images.quantized, images.exact).tolist()
    rows = zip(images.seeds, captions, images.exact, images.quantized, near, strict=True)
    shown = [
        (
            # Images span [-1, 1], so half the difference does too, and GAIN times it is clipped.
            encode_side_by_side((exact, picture, (GAIN * (picture - exact) / 2).clamp(-1, 1))),
            f"seed {seed}{words}: {db:.1f} dB",
        )
        for seed, words, exact, picture, db in rows
    ]
    return html.section("Does it draw the same pictures?", html.text(text), html.pictures(shown))


def _evaluation_section(report: Report) -> str:
    title = "What do metrics of many pictures say?"
    if report.evaluation is None:
        hint = f"Not evaluated yet: gaq-export evaluate --engine {report.file.path}, then this report again."
        return html.section(title, html.note(hint))
    text = (
        "Sets of images against a reference, then images against the float network's from the same noise. In brackets "
        "a 95 % interval. The floor is the distance of as many images of the reference to the rest of it; this many "
        "images cannot show that a set is closer than that."
    )
    parts = []
    for rows in scores.groups(report.evaluation.rows):
        head, body = scores.table(rows)
        first = next(iter(rows.values()))
        # Turned on its side, a column for each set of images: there are few sets and many metrics.
        parts.append(html.table(("", *(row[0] for row in body)), list(zip(head, *body, strict=True))[1:]))
        parts.append(html.text(_depends_on(first)))
    left_out = "".join(html.note(f"Left out: {what}") for what in report.evaluation.left_out)
    return html.section(title, html.text(text), *parts, left_out)


def _depends_on(row: Sequence[Score]) -> str:
    """Return a sentence about what the scores depend on: those of one row, and so of all."""
    context = check_record(ShownContext, dict(row[0].context), "The evaluation", "Evaluate again", others=True)
    parts = [f"{context.images} images"]
    if context.seeds is not None:
        parts.append(f"seeds {context.seeds[0]} to {context.seeds[1]}")
    if (sampler := context.sampler) is not None:
        parts.append(f"{sampler.name}, {sampler.steps} steps, {sampler.spacing} spacing, eta {sampler.eta:g}")
    if context.exact_sha256 is not None:
        parts.append(f"float images {context.exact_sha256[:12]}")
    if context.features_sha256 is not None:
        parts.append(f"features {context.features} ({context.features_sha256[:12]})")
    if context.reference_sha256 is not None:
        digest = context.reference_sha256[:12]
        parts.append(f"reference {context.reference}, {context.reference_images} images ({digest})")
        parts.append(f"floor of {context.floor_images} images")
    return "; ".join(parts) + "."


def _noise_section(report: Report) -> str:
    who = "engine" if report.not_run is None else "plan in PyTorch"
    text = (
        f"The {who} and the float network predict the noise of the same images, at each step: the power of the float "
        "prediction over that of the difference. Along the float network's trajectory errors do not add up; along the "
        "quantized one's, both see what the quantized network has made so far."
    )
    t = timesteps(record_of(report.file).provenance.sampler, report.plan.num_train)
    means = "; ".join(
        f"along the {name} {scores.mean_db(values):.1f} dB, lowest {min(values):.1f} dB"
        for name, values in report.noise.items()
    )
    series = {f"along the {name}": values for name, values in report.noise.items()}
    numbers = f"Mean over {len(t)} steps {means}."
    return html.section(
        "Does it predict the same noise?", html.text(text), html.figure(charts.engine_sqnr(t, series), numbers)
    )


def _sizes_section(report: Report) -> str:
    ours, exact = report.sizes
    # Types that either engine has: what is float32 in one may be int8 in the other.
    kinds = sorted(k for k, size in (Counter(exact.weights) | Counter(ours.weights)).items() if size >= LITTLE)
    columns = (("float", exact), (record_of(report.file).bits, ours))

    def row(what: str, sizes: Sequence[int]) -> tuple[str, ...]:
        return (what, *(_mb(size) for size in sizes), f"{sizes[0] / sizes[1]:.2f}" if all(sizes) else "")

    rows = [row(kind, [sizes.weights.get(kind, 0) for _, sizes in columns]) for kind in kinds]
    rows.append(row("all weights", [sum(sizes.weights.values()) for _, sizes in columns]))
    rows.append(row("files", [sizes.files for _, sizes in columns]))
    text = (
        "Bytes that an engine holds, by the type it keeps them in, beside an engine of the float network by the same "
        f"backend. The plan's codes are of {_widths(report)} bits; a backend without such a type keeps them in a wider "
        "one."
    )
    head = ("", *(name for name, _ in columns), "ratio")
    return html.section("Is it smaller?", html.text(text), html.table(head, rows), html.text(report.file.audit.note))


def _widths(report: Report) -> str:
    return " and ".join(map(str, sorted({layer.weight_bits for layer in report.plan.layers.values()})))


def _audit_section(report: Report) -> str:
    audit = report.file.audit
    tables = record_of(report.file).tables
    text = (
        "What each layer with weights computes in, as the runtime reports it. A runtime may fall back to floats "
        "without a warning; this table shows where."
    )
    rows = [(kind, how, f"{count}") for (kind, how), count in sorted(audit.counts.items())]
    sentences = [f"{len(tables)} layers depend on the step alone and are tables."] if tables else []
    reasons = Counter(report.plan.float_layers.values())
    sentences += (
        [f"Kept float by the plan: {'; '.join(f'{n} x {reason}' for reason, n in reasons.items())}."] if reasons else []
    )
    if report.others:
        names = ", ".join(other.path.name for other in report.others)
        sentences.append(f"{names} take over where fewer bits are enough.")
    # Of the newest build; one on a machine that could not run the engine has none.
    parity = next((line.get("sqnr_db") for line in reversed(report.journal) if line["step"] == "build-engine"), None)
    if report.not_run is not None:
        sentences.append(f"Not run here: {report.not_run}")
    elif parity:
        sentences.append(
            f"Against fake-quantized PyTorch: median SQNR {statistics.median(parity):.1f} dB when it was built."
        )
    table = html.table(
        ("layer", "kind", "arithmetic"), [(kernel.name, kernel.kind, kernel.precision) for kernel in audit.kernels]
    )
    details = f"<details><summary>Layer by layer</summary>\n{table}</details>\n"
    words = html.text(" ".join(sentences))
    return html.section(
        "What does it compute in?", html.text(text), html.table(("", "arithmetic", "layers"), rows), words, details
    )


def _speed_section(report: Report) -> str:
    title = "Is it faster?"
    speed = report.speed
    if speed is None:
        why = "timing was switched off" if report.not_run is None else f"the engine cannot run here: {report.not_run}"
        return html.section(title, html.note(f"Not measured: {why}.{_speed_when_built(report)}"))
    rounds = len(speed.seconds[PYTORCH])
    steps = len(report.noise[FLOAT])
    text = (
        f"Whole loops of {speed.batch} images, {steps} steps, on {machine()}; they took turns, {rounds} "
        f"round{'s' * (rounds > 1)} after a warm-up, so that whatever else the machine did slowed all of them."
    )
    first = speed.median(PYTORCH)  # all ratios are to PyTorch, whatever was timed first
    rows = [
        (
            who,
            f"{speed.median(who):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{speed.batch / speed.median(who):.2f}",
            f"{first / speed.median(who):.2f}",
        )
        for who, seconds in speed.seconds.items()
    ]
    head = ("loop", "median s", "range s", "images/s", "against PyTorch")
    return html.section(title, html.text(text), html.table(head, rows))


def _seconds(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the medians of the two engines, whichever they are: PyTorch's is not among them."""
    both = {who: statistics.median(values) for who, values in seconds.items() if who != PYTORCH}
    return ", ".join(f"{who} {value:.2f} s a loop" for who, value in both.items())


def _speed_when_built(report: Report) -> str:
    """Return what the journal says of the engine's speed beside float, as a further sentence; nothing if nothing."""
    built = next((line for line in reversed(report.journal) if line["step"] == "build-engine"), None)
    if not built or not built.get("call_seconds"):
        return ""
    times = ", ".join(f"{who} {1e3 * value:.3g} ms" for who, value in built["call_seconds"].items())
    by_exact, by_engine = built["call_seconds"].values()
    words = against_float(by_engine, by_exact)
    return f" When it was built, a call of {built['call_batch']} images took {times}: {words}."


def _reproduction_section(report: Report) -> str:
    text = (
        "What was done in the run folder, then this report. With the same seed on the same machine, the plan is the "
        "same to the bit."
    )
    record = record_of(report.file)
    origin = record.provenance
    lines = [*report.journal, {"step": "report", **command_and_versions()}]
    commands = [line.get("command") or f"# {line['step']}: from Python; its settings are above" for line in lines]
    facts = {
        "model": f"{origin.source}, weights {origin.fingerprint}",
        "plan": record.plan.sha256 if record.plan else "",
        "engine": report.file.sha256,
        "calibrated with": _versions(report.origin.journal),
        "this report": _versions(command_and_versions()),
        "machine": machine(),
    }
    shown = "\n".join(map(html.escape, commands))
    return html.section("How to make it again", html.text(text), f"<pre>{shown}</pre>\n", html.facts(facts))


def _versions(line: Mapping[str, Any]) -> str:
    packages = {"gaq-export": line.get("version", "unknown"), **line.get("packages", {})}
    return ", ".join(f"{name} {number}" for name, number in packages.items())


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
