"""What a command shows on a terminal: progress with the time left, and an engine's audit as a table.

rich is loaded when something is shown, so that `--help` need not wait for it.
"""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib.progress import Progress as Done
    from gaq_export.cli.doctor import Checkup
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
    wanted = {"int8": "int8", "fp8": "float8"}[built.file.about["numbers"]]
    done = sum(count for (_, precision), count in audit.counts.items() if precision == wanted)
    reasons: dict[str, int] = {}
    for reason in built.plan.float_layers.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if baked := built.file.about["baked"]:
        console.print(f"{len(baked)} layers depend on the step alone and are tables", highlight=False)
    kept = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    console.print(f"in {wanted} arithmetic: {done} of the plan's {len(built.plan.layers)} layers", highlight=False)
    console.print(f"kept float by the plan: {kept}", highlight=False)
    for other in built.others:
        console.print(f"{other.path.name} takes over where {other.about['bits']} is enough", highlight=False)
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


def print_checkup(found: "Checkup") -> None:
    """Print what a machine can do, and what each gap needs."""
    from rich.console import Console
    from rich.table import Table

    console, machine = Console(), found.machine
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
    for name, (build, run) in found.backends.items():
        marks = ["no" if problem else "yes" for problem in (build, run)]
        table.add_row(name, *marks, "; ".join(dict.fromkeys(filter(None, (build, run)))))
    console.print(table)
    console.print(f"build-engine takes: {found.best or 'nothing, see above'}", highlight=False)


class Bars:
    """Progress on a terminal: a bar with the time left; finished blocks as lines. Silent if quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "Bars":
        if self._bar.console.is_interactive:  # elsewhere the bar would only leave an empty line
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.console.is_interactive:
            self._bar.stop()

    def _show(self, stage: str, text: str, fraction: float) -> None:
        """Move the bar; the time left follows from the work done since this process began."""
        if stage not in self._tasks:
            for finished in self._tasks.values():
                self._bar.update(finished, visible=False)
            self._tasks[stage] = self._bar.add_task(text, total=1.0, left="")
            self._first[stage] = (time.perf_counter(), fraction)
        started, offset = self._first[stage]
        done, elapsed = fraction - offset, time.perf_counter() - started
        left = f"{_duration(elapsed * (1 - fraction) / done)} left" if done > 0 else ""
        self._bar.update(self._tasks[stage], completed=fraction, description=text, left=left)

    def collect(self, done: int, total: int) -> None:
        """Show how many network calls of the float sampler are done."""
        self._show("collect", f"collecting {done}/{total}", done / total)

    def calibrate(self, progress: "Done") -> None:
        """Show the block at work, and a line for each finished one."""
        result = progress.result
        if progress.resumed:
            self._first["calibrate"] = (time.perf_counter(), progress.fraction)
        if result is not None and not self._bar.disable:
            how = " (kept from before)" if progress.resumed else ""
            self._bar.console.print(
                f"{progress.index + 1:3}/{progress.total} {result.name}: loss {result.loss_before:.3g} -> "
                f"{result.loss_after:.3g}{how}",
                highlight=False,
            )
        number = f"{progress.index + 1}/{progress.total} " if progress.stage == "block" else ""
        self._show("calibrate", f"{number}{progress.name}", progress.fraction)

    def correct(self, done: int, total: int) -> None:
        """Show how many steps' corrections are measured."""
        self._show("correct", f"following the sampler, step {done}/{total}", done / total)

    def sample(self, who: str, done: int, total: int) -> None:
        """Show how many network calls are done."""
        self._show(who, f"drawing ({who}) {done}/{total}", done / total)

    def images(self, done: int, total: int) -> None:
        """Show how many images are drawn, and how many a second."""
        started, offset = self._first.get("images", (time.perf_counter(), done / total))
        seconds = time.perf_counter() - started
        rate = f", {(done - offset * total) / seconds:.2f} images/s" if seconds > 0 and done > offset * total else ""
        self._show("images", f"drawing {done}/{total}{rate}", done / total)

    def inspect(self, what: str, done: int, total: int) -> None:
        """Show what is being measured and how much of it is done."""
        self._show(what, f"{what} {done}/{total}", done / total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
