"""What commands print as a result: an engine's audit, an evaluation, what a machine can do.

Tables are drawn by rich, which is imported for the first one, so that `--help` need not wait for it. Everything else is
plain lines, which are never wrapped: they go to logs too.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from engines.machine import Machine
    from gaq_export.cli.doctor import Diagnosis
    from gaq_export.deploy.build import Built
    from gaq_export.deploy.parity import Parity
    from gaq_export.deploy.submodels import Part
    from gaq_export.evaluation.evaluate import Evaluation
    from gaq_export.quantize.verdict import Verdict

SMALLEST_SHARE = 5000  # bytes; types with fewer are not printed


def print_audit(built: "Built") -> None:
    """Print layers by arithmetic, weight bytes by type, what stayed float and why, and the parity."""
    audit = built.file.audit
    rows = [(kind, precision, str(count)) for (kind, precision), count in sorted(audit.counts.items())]
    _print_table(("layers", "arithmetic", "count"), rows, title=f"{built.file.backend} audit")
    _print_lines(audit_lines(built))


def print_verdict(verdict: "Verdict", quiet: bool) -> None:
    """Print how far the quantized network is from the float one, and a warning, also if `quiet`, where that is far."""
    if not quiet:
        typer.echo(verdict.line)
    if verdict.poor:
        typer.echo(f"warning: {verdict.warning}", err=True)


def require(verdict: "Verdict", least_db: float | None) -> None:
    """Print an error and exit with code 3 if a verdict is below what the user requires, None for nothing."""
    if least_db is not None and verdict.db < least_db:
        typer.echo(
            f"error: {verdict.db:.1f} dB against the float network, {least_db:g} dB required (--require-db).", err=True
        )
        raise typer.Exit(3)


def audit_lines(built: "Built") -> list[str]:
    """Return what the table of layers does not say about an engine, a sentence a line."""
    from gaq_export.deploy.record import Numbers, record_of

    audit = built.file.audit
    plan = built.plan
    record = record_of(built.file)
    sizes = [
        f"{kind} {size / 1e6:.2f} MB" for kind, size in sorted(audit.weight_bytes.items()) if size >= SMALLEST_SHARE
    ]
    arithmetic = {Numbers.INT8: "int8", Numbers.FP8: "float8"}[record.numbers]
    quantized = sum(count for (_, precision), count in audit.counts.items() if precision == arithmetic)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(plan.float_layers.values()).items())
    lines = [f"weights: {', '.join(sizes)}; {audit.total_weight_bytes / 1e6:.2f} MB in all. {audit.note}"]
    if audit.portability is not None:
        lines.append(f"portable ({', '.join(built.file.portable)}): {audit.portability}")
    if record.tables:
        lines.append(f"{len(record.tables)} layers depend on the step alone and are tables")
    lines += [
        f"in {arithmetic} arithmetic: {quantized} of the plan's {len(plan.layers)} layers",
        f"kept float by the plan: {reasons}",
    ]
    lines += [f"{other.path.name} takes over where {record_of(other).bits} is enough" for other in built.others]
    if built.decoder is not None:
        lines.append(_part_line(built.decoder, "makes images of the latents"))
    lines += [_part_line(encoder, "encodes prompts") for encoder in built.texts]
    lines.append(f"not run here: {built.not_run}" if built.parity is None else _parity_line(built.parity))
    if built.timing is not None:
        lines.append(f"speed: {built.timing.line}")
    return lines


def _part_line(part: "Part", purpose: str) -> str:
    """Return what the engine of a decoder or text encoder is for, and how close to PyTorch it is if it runs here."""
    closeness = "" if part.parity is None else f"; against PyTorch: {part.parity.sqnr_db[0]:.1f} dB"
    return f"{part.file.path.name} {purpose}, in float32{closeness}"


def _parity_line(parity: "Parity") -> str:
    """Return how close an engine is to PyTorch, and where it is closest to failing."""
    worst = parity.worst  # by distance to what is required, which differs from step to step
    count = len(parity.steps)
    return (
        f"against fake-quantized PyTorch: median SQNR {sorted(parity.sqnr_db)[count // 2]:.1f} dB over {count} steps; "
        f"closest to its limit at step {parity.steps[worst]}: {parity.sqnr_db[worst]:.1f} dB, "
        f"{parity.required_db(worst):.1f} dB required"
    )


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print a table for all scores that can be compared, the SQNR of the predicted noise, and what was left out."""
    from gaq_export.evaluation import scores

    for group in scores.groups(evaluation.rows):
        head, body = scores.table(group)
        # Turned on its side, a column for each set of images: there are few sets and many metrics.
        metrics = list(zip(head, *body, strict=True))
        _print_table(metrics[0], metrics[1:])
    for name, trajectories in evaluation.steps.items():
        means = ", ".join(f"{scores.mean_db(values):.1f} dB on the {where}" for where, values in trajectories.items())
        typer.echo(f"{name}: SQNR of the predicted noise, mean over steps: {means}")
    _print_lines(f"left out: {reason}" for reason in evaluation.left_out)


def print_diagnosis(diagnosis: "Diagnosis") -> None:
    """Print what a machine has, and for each backend what it can do here and what it lacks."""
    _print_lines([*machine_lines(diagnosis.machine), f"PyTorch: {diagnosis.pytorch}"])
    rows = []
    for name, problems in diagnosis.backends.items():
        # Once, if the same problem keeps it from building and running.
        missing = "; ".join(dict.fromkeys(filter(None, problems)))
        rows.append((name, *("no" if problem else "yes" for problem in problems), missing))
    _print_table(("backend", "builds", "runs", "what is missing"), rows)
    typer.echo(f"build-engine takes: {diagnosis.best or 'nothing, see above'}")


def machine_lines(machine: "Machine") -> list[str]:
    """Return processor, GPUs and packages, a line each."""
    features = "unknown" if machine.features is None else ", ".join(machine.features) or "none that matter"
    lines = [f"processor: {machine.processor}; {features}"]
    lines += [
        f"GPU: {gpu.name}, compute capability {gpu.capability}, {gpu.memory_bytes / 2**30:.0f} GiB, CUDA {gpu.cuda}"
        for gpu in machine.gpus
    ] or ["GPU: no NVIDIA driver or no GPU"]
    lines += [f"note: {gpu.advice}" for gpu in machine.gpus if gpu.advice]
    installed = ", ".join(f"{name} {version}" for name, version in machine.packages.items() if version)
    return [*lines, f"installed: {installed}"]


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)  # not by rich, which would wrap it at the width of the terminal
