"""The command line: parse, call the pipeline, print. No logic, and no heavy import before a command runs."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gaq_export import __version__

if TYPE_CHECKING:
    from calib.progress import Progress as Done
    from gaq_export.pipeline import Built

app = typer.Typer(
    name="gaq-export",
    help="Quantize a diffusion model, build a low-bit engine, draw with it. Start with: gaq-export calibrate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunFolder = Annotated[Path, typer.Option("--run", help="Folder that keeps the calibration, so that it can continue.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Local diffusers folder, or 'random' (meaningless pictures, for trying build and speed)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Quantize a diffusion model, build a low-bit engine, draw with it."""
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A name from `gaq-export models`.")] = None,
    weights: Weights = None,
    wbits: Annotated[int, typer.Option(help="Weight bits, 2 to 8.")] = 4,
    abits: Annotated[int, typer.Option(help="Activation bits, 2 to 8.")] = 8,
    preset: Annotated[
        str, typer.Option(envvar="GAQ_EXPORT_PRESET", help="tiny (smoke test), fast (minutes) or paper (as published).")
    ] = "fast",
    omega: Annotated[str, typer.Option(help="Sample weights: gac (gradient alignment) or uniform.")] = "gac",
    convention: Annotated[
        str, typer.Option(help="Layers that stay float: deploy (first, last, time embedding) or tfmq (the papers').")
    ] = "deploy",
    keep_float: Annotated[list[str] | None, typer.Option(help="Pattern of further layers to keep float.")] = None,
    images: Annotated[int | None, typer.Option(help="Trajectories to collect, instead of the preset's.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations a block, instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random in the calibration.")] = 0,
    run: RunFolder = Path("gaq-run"),
    quiet: Quiet = False,
) -> None:
    """Learn integer weights and activation scales; a killed run continues where it was."""
    with _one_line_errors():
        from dataclasses import replace

        from gaq_export import pipeline
        from gaq_export.errors import GaqError

        if model is None and weights is None:
            raise GaqError("Give --model NAME (see `gaq-export models`) or --weights FOLDER.")
        chosen = pipeline.preset(
            preset,
            wbits=wbits,
            abits=abits,
            omega=omega,
            convention=convention,
            keep_float=tuple(keep_float or ()),
            seed=seed,
        )
        if images is not None:
            chosen = replace(chosen, images=images)
        if iterations is not None:
            fitting = replace(chosen.config.reconstruction, iterations=iterations)
            chosen = replace(chosen, config=replace(chosen.config, reconstruction=fitting))
        loaded = pipeline.load_model(model, weights)
        _warn_if_meaningless(loaded.meaningless)
        with _Bars(quiet) as bars:
            plan = pipeline.calibrate(loaded, chosen, folder=run, on_collect=bars.collect, on_progress=bars.calibrate)
        bits = f"W{wbits}A{abits}"
        print(f"{bits}: {len(plan.layers)} layers quantized, {len(plan.float_layers)} stay float -> {run}/plan.safetensors")
        if not quiet:
            print("next: gaq-export build-engine" + ("" if run == Path("gaq-run") else f" --run {run}"))


@app.command()
def build_engine(
    run: RunFolder = Path("gaq-run"),
    backend: Annotated[
        str | None, typer.Option(help="openvino, onnxruntime, tensorrt-rtx or tensorrt; the best present by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The engine file; its record is written beside it.")] = Path("unet.plan"),
    batch: Annotated[str, typer.Option(help="Smallest, best and largest batch.")] = "1,4,16",
    target: Annotated[
        list[str] | None, typer.Option(help="GPU generation such as sm89 (tensorrt-rtx only); portable by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (openvino, onnxruntime).")] = None,
    quiet: Quiet = False,
) -> None:
    """Emit the quantized graph, build an engine, audit its layers and check it against PyTorch."""
    with _one_line_errors():
        import engines
        from gaq_export import pipeline
        from gaq_export.errors import GaqError

        try:
            least, best, most = (int(n) for n in batch.split(","))
        except ValueError:
            raise GaqError(f"--batch {batch!r}: give three numbers, such as 1,4,16.") from None
        config = engines.EngineConfig(
            backend=backend or engines.best_backend(),
            batch=(least, best, most),
            targets=tuple(target or ()),
            threads=threads,
        )
        built = pipeline.build_engine(folder=run, out=out, config=config)
        if not quiet:
            _print_audit(built)
        print(f"{config.backend} engine -> {out} ({out.stat().st_size / 1e6:.1f} MB, {built.file.build_seconds:.1f} s)")
        if not quiet and built.not_run is None:
            print(f"next: gaq-export sample --engine {out}")


@app.command()
def sample(
    engine: Annotated[Path, typer.Option(help="The engine file.")] = Path("unet.plan"),
    num: Annotated[int, typer.Option("--num", "-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first image; image i has seed + i.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Images at a time; the engine's best by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps, instead of the engine file's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim or ddpm, instead of the engine file's.")] = None,
    spacing: Annotated[str | None, typer.Option(help="uniform or quad, instead of the engine file's.")] = None,
    eta: Annotated[float | None, typer.Option(help="Noise that DDIM adds, 0 to 1.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also draw with the float model, side by side.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    quiet: Quiet = False,
) -> None:
    """Run the whole denoising loop on the engine and write PNGs, a grid and samples.json."""
    with _one_line_errors():
        import engines
        from gaq_export import pipeline
        from gaq_export.schedule import SamplerSpec

        wishes = {"steps": steps, "name": sampler, "spacing": spacing, "eta": eta}
        asked = {key: value for key, value in wishes.items() if value is not None}
        spec = SamplerSpec.from_json({**engines.load_engine_file(engine).about["sampler"], **asked}) if asked else None
        with _Bars(quiet) as bars:
            drawn = pipeline.sample(
                engine, num=num, seed=seed, batch=batch, sampler=spec, out=out, compare=compare, on_step=bars.sample
            )
        _warn_if_meaningless(drawn.meaningless)
        print(f"{num} images in {drawn.seconds:.1f} s ({num / drawn.seconds:.2f} images/s) -> {drawn.grid}")
        if drawn.psnr_db is not None:
            ordered = sorted(drawn.psnr_db)
            print(f"PSNR against float from the same noise: median {ordered[len(ordered) // 2]:.1f} dB, worst {ordered[0]:.1f} dB")


@app.command()
def export(
    run: RunFolder = Path("gaq-run"),
    profile: Annotated[str, typer.Option(help="reference, trt (also OpenVINO's) or ort-cpu.")] = "reference",
    out: Annotated[Path | None, typer.Option(help="ONNX file; in the run folder by default.")] = None,
) -> None:
    """Write the quantized ONNX graph alone, for other tools."""
    with _one_line_errors():
        from gaq_export import pipeline

        print(pipeline.export_onnx(profile, folder=run, out=out))


@app.command()
def models() -> None:
    """List the models known by name."""
    with _one_line_errors():
        from gaq_export.models import MODELS

        for spec in MODELS.values():
            print(f"{spec.name:14} {spec.description}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2; let everything else show its traceback."""
    from gaq_export.errors import user_errors

    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    except user_errors() as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from None


def _warn_if_meaningless(meaningless: bool) -> None:
    if meaningless:
        print("note: random weights, so the pictures are meaningless", file=sys.stderr)


def _print_audit(built: "Built") -> None:
    """Print layers by precision, weight bytes by type, what stayed float and why, and the parity."""
    from rich.console import Console
    from rich.table import Table

    console, audit = Console(), built.file.audit
    table = Table("layers", "arithmetic", "count", title=f"{built.file.backend} audit")
    for (kind, precision), count in sorted(audit.counts.items()):
        table.add_row(kind, precision, str(count))
    console.print(table)
    held = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in sorted(audit.weight_bytes.items()))
    console.print(f"weights: {held}; {audit.total_weight_bytes / 1e6:.2f} MB in all. {audit.note}", highlight=False)
    reasons: dict[str, int] = {}
    for reason in built.plan.float_layers.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    kept = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    console.print(f"quantized by the plan: {len(built.plan.layers)}; kept float: {kept}", highlight=False)
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


class _Bars:
    """Progress on a terminal: a bar with the time left; finished blocks as lines. Silent if quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "_Bars":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, stage: str, text: str, fraction: float) -> None:
        """Move the bar; the time left follows from the work done since this process began."""
        if stage not in self._tasks:
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
        self._show("calibrate", f"{progress.index + 1}/{progress.total} {progress.name}", progress.fraction)

    def sample(self, who: str, done: int, total: int) -> None:
        """Show how many network calls are done."""
        self._show(who, f"drawing ({who}) {done}/{total}", done / total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
