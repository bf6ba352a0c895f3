"""The tables that commands print: an engine's audit, an evaluation, what a machine can do.

rich is loaded when something is shown, so that `--help` need not wait for it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gaq_export.cli.doctor import Diagnosis
    from gaq_export.evaluation.evaluate import Evaluation
    from gaq_export.pipeline import Built


def print_audit(built: "Built") -> None:
    """Print layers by precision, weight bytes by type, what stayed float and why, and the parity."""
    from rich.console import Console
    from rich.table import Table

    console, audit = Console(), built.file.audit
    table = Table("layers", "arithmetic", "count", title=f"{built.file.backend} audit")
    for (kind, precision), count in sorted(audit.counts.items()):
        table.add_row(kind, precision, str(count))
    console.print(table)
    held = [f"{kind} {size / 1e6:.2f} MB" for kind, size in sorted(audit.weight_bytes.items()) if size >= 5000]
    console.print(
        f"weights: {', '.join(held)}; {audit.total_weight_bytes / 1e6:.2f} MB in all. {audit.note}", highlight=False
    )
    from gaq_export.deploy.record import record_of

    record = record_of(built.file)
    wanted = {"int8": "int8", "fp8": "float8"}[record.numbers]
    done = sum(count for (_, precision), count in audit.counts.items() if precision == wanted)
    reasons: dict[str, int] = {}
    for reason in built.plan.float_layers.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if record.tables:
        console.print(f"{len(record.tables)} layers depend on the step alone and are tables", highlight=False)
    kept = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    console.print(f"in {wanted} arithmetic: {done} of the plan's {len(built.plan.layers)} layers", highlight=False)
    console.print(f"kept float by the plan: {kept}", highlight=False)
    for other in built.others:
        console.print(f"{other.path.name} takes over where {record_of(other).bits} is enough", highlight=False)
    if built.decoder is not None:
        checked = built.decoder.parity
        near = "" if checked is None else f"; against PyTorch: {checked.sqnr_db[0]:.1f} dB"
        console.print(f"{built.decoder.file.path.name} makes images of the latents, in float32{near}", highlight=False)
    for encoder in built.texts:
        near = "" if encoder.parity is None else f"; against PyTorch: {encoder.parity.sqnr_db[0]:.1f} dB"
        console.print(f"{encoder.file.path.name} encodes prompts, in float32{near}", highlight=False)
    if built.parity is None:
        console.print(f"not run here: {built.not_run}", highlight=False)
    else:
        p, w = built.parity, built.parity.worst
        console.print(
            f"against fake-quantized PyTorch: median SQNR {sorted(p.sqnr_db)[len(p.steps) // 2]:.1f} dB over "
            f"{len(p.steps)} steps; closest to its limit at step {p.steps[w]}: {p.sqnr_db[w]:.1f} dB, "
            f"{p.required_db(w):.1f} dB required",
            highlight=False,
        )


def print_evaluation(found: "Evaluation") -> None:
    """Print the figures that may stand together as a table, and the noise's SQNR."""
    from rich.console import Console
    from rich.table import Table

    from gaq_export.evaluation import scores

    console = Console()
    for rows in scores.groups(found.rows):
        head, body = scores.table(rows)
        shown = Table(*(row[0] for row in [head, *body]))  # a column a row, which is narrower
        for metric in list(zip(head, *body, strict=True))[1:]:
            shown.add_row(*metric)
        console.print(shown)
    for name, trajectories in found.steps.items():
        words = [f"{scores.mean_db(rows):.1f} dB on the {where}" for where, rows in trajectories.items()]
        console.print(f"{name}: SQNR of the predicted noise, mean over steps: {', '.join(words)}", highlight=False)
    for what in found.left_out:
        console.print(f"left out: {what}", highlight=False)


def print_diagnosis(diagnosis: "Diagnosis") -> None:
    """Print what a machine can do, and what each backend lacks."""
    from rich.console import Console
    from rich.table import Table

    console, machine = Console(), diagnosis.machine
    features = "unknown" if machine.features is None else ", ".join(machine.features) or "none that matter"
    console.print(f"processor: {machine.processor}; {features}", highlight=False)
    for gpu in machine.gpus:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        console.print(
            f"GPU: {gpu.name}, compute capability {gpu.capability}, {memory}, CUDA {gpu.cuda}", highlight=False
        )
    if not machine.gpus:
        console.print("GPU: no NVIDIA driver or no GPU", highlight=False)
    installed = ", ".join(f"{name} {number}" for name, number in machine.packages.items() if number)
    console.print(f"installed: {installed}", highlight=False)
    table = Table("backend", "builds", "runs", "what is missing")
    for name, problems in diagnosis.backends.items():
        yes_or_no = ["no" if problem else "yes" for problem in problems]
        table.add_row(name, *yes_or_no, "; ".join(dict.fromkeys(filter(None, problems))))
    console.print(table)
    console.print(f"build-engine takes: {diagnosis.best or 'nothing, see above'}", highlight=False)
