"""The command line: parse, call the pipeline, print. No logic, and no heavy import before a command runs."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gaq_export import __version__, terminal

if TYPE_CHECKING:
    from calib.plan import QuantPlan
    from gaq_export.models import LoadedModel
    from gaq_export.schedule import SamplerSpec

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
GraphKind = Annotated[
    str, typer.Option(help="step (whole denoising steps of one sampler) or eps (the network alone, for any sampler).")
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps, instead of the calibration's or the engine's.")]
SamplerName = Annotated[str | None, typer.Option(help="ddim, ddpm or dpmpp-2m, instead of the calibration's.")]
Spacing = Annotated[str | None, typer.Option(help="uniform, quad or beta, instead of the calibration's.")]
Eta = Annotated[float | None, typer.Option(help="Noise that DDIM adds, 0 to 1.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Quantize a diffusion model, build a low-bit engine, draw with it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A name from `gaq-export models`.")] = None,
    weights: Weights = None,
    wbits: Annotated[int, typer.Option(help="Weight bits, 2 to 8.")] = 4,
    abits: Annotated[int, typer.Option(help="Activation bits, 2 to 8.")] = 8,
    preset: Annotated[
        str, typer.Option(envvar="GAQ_EXPORT_PRESET", help="tiny (smoke test), fast (minutes) or paper (as published).")
    ] = "fast",
    recipe: Annotated[
        str | None,
        typer.Option(help="A published method, see `gaq-export recipes`; options beside it take precedence."),
    ] = None,
    omega: Annotated[
        str | None,
        typer.Option(
            help="Sample weights: gac (gradient alignment; default), gac-exact, fish, mse, random or uniform (none)."
        ),
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            help="Layers that stay float: deploy (first, last, time embedding; default) or tfmq (the papers')."
        ),
    ] = None,
    correct: Annotated[
        str | None, typer.Option(help="What the sampler corrects of the noise: none (the default), ptqd or tac.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bits of each layer's own: 4, 8 or float, the best within 5bits (on average), 2.5MB or 300Gbit-ops."
        ),
    ] = None,
    keep_float: Annotated[list[str] | None, typer.Option(help="Pattern of further layers to keep float.")] = None,
    per_step_ranges: Annotated[
        bool | None,
        typer.Option("--per-step-ranges/--shared-ranges", help="Activation grids of each sampling step's own or not."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--moved", help="0 in the middle of every activation grid: coarser, fewer GPU kernels."
        ),
    ] = None,
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

        loaded = _loaded(model, weights)
        chosen = pipeline.preset(
            preset,
            wbits=wbits,
            abits=abits,
            recipe=recipe,
            omega=omega,
            convention=convention,
            correction=correct,
            budget=budget,
            keep_float=tuple(keep_float or ()),
            per_step=per_step_ranges,
            symmetric=symmetric,
            seed=seed,
        )
        if images is not None:
            chosen = replace(chosen, images=images)
        if iterations is not None:
            fitting = replace(chosen.config.reconstruction, iterations=iterations)
            chosen = replace(chosen, config=replace(chosen.config, reconstruction=fitting))
        with terminal.Bars(quiet) as bars:
            plan = pipeline.calibrate(
                loaded, chosen, folder=run, on_collect=bars.collect, on_progress=bars.calibrate, on_correct=bars.correct
            )
        counts = f"{len(plan.layers)} layers quantized, {len(plan.float_layers)} stay float"
        widths = f"W{wbits}A{abits}" if budget is None else f"mixed ({_widths(plan)}) A{abits}"
        typer.echo(f"{widths}: {counts} -> {run}/plan.safetensors")
        if not quiet:
            typer.echo("next: gaq-export build-engine" + ("" if run == Path("gaq-run") else f" --run {run}"))


@app.command()
def build_engine(
    run: RunFolder = Path("gaq-run"),
    backend: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, tensorrt-rtx, openvino, onnxruntime or onnxruntime-cuda; the best present by default. "
            "onnxruntime-cuda has no INT8 convolutions: it rounds as the others do and computes in FP16."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The engine file; its record is written beside it.")] = Path("unet.plan"),
    batch: Annotated[str, typer.Option(help="Smallest, best and largest batch.")] = "1,4,16",
    graph: GraphKind = "step",
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
    target: Annotated[
        list[str] | None, typer.Option(help="GPU generation such as sm89 (tensorrt-rtx only); portable by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (openvino, onnxruntime).")] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help="What is not integer: float32, bfloat16 or float16; float16 for TensorRT, float32 elsewhere."
        ),
    ] = None,
    numbers: Annotated[
        str,
        typer.Option(help="int8, or fp8: E4M3 numbers in place of integers (TensorRT, sm89 and later)."),
    ] = "int8",
    correction: Annotated[
        bool,
        typer.Option("--correction/--no-correction", help="With the plan's correction of the noise, if any."),
    ] = True,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Put them in an ONNX file beside the plan (TensorRT, with a GPU)."),
    ] = False,
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
            compute=compute,
            stripped=strip_weights,
        )
        spec = _changed(pipeline.sampler_of(run), steps=steps, name=sampler, spacing=spacing, eta=eta)
        built = pipeline.build_engine(
            folder=run, out=out, config=config, graph=graph, sampler=spec, numbers=numbers, correct=correction
        )
        if not quiet:
            terminal.print_audit(built)
        typer.echo(
            f"{config.backend} engine -> {out} ({out.stat().st_size / 1e6:.1f} MB, {built.file.build_seconds:.1f} s)"
        )
        if not quiet and built.not_run is None:
            typer.echo(f"next: gaq-export sample --engine {out}")


@app.command()
def sample(
    engine: Annotated[Path, typer.Option(help="The engine file.")] = Path("unet.plan"),
    num: Annotated[int, typer.Option("--num", "-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first image; image i has seed + i.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Images at a time; the engine's best by default.")] = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also draw with the float model, side by side.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    quiet: Quiet = False,
) -> None:
    """Run the whole denoising loop on the engine and write PNGs, a grid and samples.json."""
    with _one_line_errors():
        import engines
        from gaq_export import pipeline
        from gaq_export.schedule import SamplerSpec

        own = SamplerSpec.from_json(engines.load_engine_file(engine).about["sampler"])
        spec = _changed(own, steps=steps, name=sampler, spacing=spacing, eta=eta)
        with terminal.Bars(quiet) as bars:
            drawn = pipeline.sample(
                engine, num=num, seed=seed, batch=batch, sampler=spec, out=out, compare=compare, on_step=bars.sample
            )
        _warn_if_meaningless(drawn.meaningless)
        typer.echo(f"{num} images in {drawn.seconds:.1f} s ({num / drawn.seconds:.2f} images/s) -> {drawn.grid}")
        if drawn.psnr_db is not None:
            ordered = sorted(drawn.psnr_db)
            median, worst = ordered[len(ordered) // 2], ordered[0]
            typer.echo(f"PSNR against float from the same noise: median {median:.1f} dB, worst {worst:.1f} dB")


@app.command()
def export(
    run: RunFolder = Path("gaq-run"),
    profile: Annotated[str, typer.Option(help="reference, trt, trt-fp8, openvino, ort-cpu or ort-cuda.")] = "reference",
    graph: GraphKind = "step",
    out: Annotated[Path | None, typer.Option(help="ONNX file; in the run folder by default.")] = None,
) -> None:
    """Write the quantized ONNX graph alone, for other tools."""
    with _one_line_errors():
        from gaq_export import pipeline

        typer.echo(pipeline.export_onnx(profile, graph=graph, folder=run, out=out).path)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="Folder of a finished calibration.")] = Path("gaq-run"),
    block: Annotated[
        str | None, typer.Option(help="Block to look into; by default the one with the largest loss when rounded.")
    ] = None,
    images: Annotated[int, typer.Option(help="Fresh images on which the predicted noise is compared.")] = 8,
    out: Annotated[Path | None, typer.Option(help="HTML file; inspect.html in the run folder by default.")] = None,
    quiet: Quiet = False,
) -> None:
    """Look inside a calibration: one HTML page of figures on its gradients, losses, noise and ranges."""
    with _one_line_errors():
        from gaq_export import pipeline

        with terminal.Bars(quiet) as bars:
            path = pipeline.inspect(folder=run, out=out, block=block, images=images, on_step=bars.inspect)
        typer.echo(path)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what is installed, which backends can build and run here, and what is missing for the others."""
    with _one_line_errors():
        import json

        from gaq_export.checkup import checkup

        found = checkup()
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        else:
            terminal.print_checkup(found)


@app.command()
def compare(
    model: Annotated[str | None, typer.Argument(help="A name from `gaq-export models`.")] = None,
    weights: Weights = None,
    recipes: Annotated[
        str, typer.Option(help="Names with commas between them, see `gaq-export recipes`; all if empty.")
    ] = "",
    wbits: Annotated[int, typer.Option(help="Weight bits, 2 to 8.")] = 4,
    abits: Annotated[int, typer.Option(help="Activation bits, 2 to 8.")] = 8,
    bits: Annotated[str, typer.Option(help="Several settings, as W8A8,W4A8, in place of the two above.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Calibrations of each recipe.")] = 1,
    preset: Annotated[str, typer.Option(envvar="GAQ_EXPORT_PRESET", help="tiny, fast or paper.")] = "fast",
    iterations: Annotated[int | None, typer.Option(help="Iterations a block, instead of the preset's.")] = None,
    images: Annotated[int, typer.Option(min=0, help="Images that each network draws; 0 leaves them out.")] = 64,
    data: Annotated[Path | None, typer.Option(help=".npz of real images, for Frechet distances.")] = None,
    features: Annotated[Path | None, typer.Option(help="ResNet-56 checkpoint, for three-channel images.")] = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    spacing: Spacing = None,
    eta: Eta = None,
    folder: Annotated[Path, typer.Option(help="Keeps results, so that it can continue.")] = Path("gaq-compare"),
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; --folder if not given.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Calibrations beside each other, one thread each.")] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the pages from what is there.")] = False,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Calibrate with several recipes and judge them side by side; finished ones are kept."""
    with _one_line_errors():
        from gaq_export import cells, comparison
        from gaq_export import compare as comparing
        from gaq_export.recipes import RECIPES

        loaded = _loaded(model, weights)
        bench = comparing.comparison(
            loaded,
            recipes.split(",") if recipes else list(RECIPES),
            comparison.schedule(preset, iterations),
            bits=comparison.parse_bits(bits or f"W{wbits}A{abits}"),
            seeds=seeds,
            folder=folder,
            images=images,
            sampler=_changed(loaded.spec.sampler, name=sampler, steps=steps, spacing=spacing, eta=eta),
            data=data,
            features=features,
            workers=workers,
        )
        name = f"compare-{loaded.spec.name}"
        pages = comparing.Pages(html=(out or folder) / f"{name}.html", markdown=(out or folder) / f"{name}.md")
        command = comparing.command_line(sys.argv[1:])
        cells.execute(bench, job, report_only, lambda: comparing.write_pages(bench, command, pages), typer.echo)
        if not job:
            typer.echo(f"-> {pages.html}")


@app.command()
def recipes() -> None:
    """List the published methods that `calibrate --recipe` knows."""
    with _one_line_errors():
        from gaq_export.recipes import RECIPES

        for name, recipe in RECIPES.items():
            typer.echo(f"{name:14} {recipe.description}")


@app.command()
def models() -> None:
    """List the models known by name."""
    with _one_line_errors():
        from gaq_export.models import MODELS

        for spec in MODELS.values():
            typer.echo(f"{spec.name:14} {spec.description}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2; let everything else show its traceback."""
    from gaq_export.errors import user_errors

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it was", err=True)
        raise typer.Exit(130) from None
    except user_errors() as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _changed(own: "SamplerSpec", **asked: object) -> "SamplerSpec | None":
    """Return `own` with what was asked for put in, None if that is nothing."""
    from dataclasses import replace

    wishes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    return replace(own, **wishes) if wishes else None


def _widths(plan: "QuantPlan") -> str:
    """Say how many layers have which weight bits."""
    counts = Counter(layer.weight_bits for layer in plan.layers.values())
    return ", ".join(f"{count} x {bits} bits" for bits, count in sorted(counts.items()))


def _loaded(model: str | None, weights: str | None) -> "LoadedModel":
    """Return the model by name or folder, and say so if its weights mean nothing."""
    from gaq_export import pipeline
    from gaq_export.errors import GaqError

    if model is None and weights is None:
        raise GaqError("Give the name of a model (see `gaq-export models`), or --weights FOLDER.")
    loaded = pipeline.load_model(model, weights)
    _warn_if_meaningless(loaded.meaningless)
    return loaded


def _warn_if_meaningless(meaningless: bool) -> None:
    if meaningless:
        typer.echo("note: random weights, so the pictures are meaningless", err=True)
