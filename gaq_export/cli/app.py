"""The command line: parse, call the pipeline, print. No logic, and no heavy import before a command runs."""

from pathlib import Path
from typing import Annotated

import typer

from gaq_export._version import __version__
from gaq_export.cli import calibrate, evaluate, share, terminal
from gaq_export.cli.options import (
    Classes,
    Eta,
    GraphKind,
    Guidance,
    Prompts,
    Quiet,
    RunFolder,
    SamplerName,
    Spacing,
    Steps,
    changed,
    one_line_errors,
    warn_if_meaningless,
)

PNGS = 1000  # more images than this go to files of many

app = typer.Typer(
    name="gaq-export",
    help="Quantize a diffusion model, build a low-bit engine, draw with it. Start with: gaq-export calibrate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


app.command()(calibrate.calibrate)


@app.command()
def build_engine(
    run: RunFolder = Path("gaq-run"),
    weights: Annotated[
        Path | None, typer.Option(help="A pack, see `gaq-export pack`: its plan becomes the run's, and is built.")
    ] = None,
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
    with one_line_errors():
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
        if weights is not None:
            from gaq_export.run import Run
            from gaq_export.sharing import pack

            pack.unpack(weights, Run(folder=run))
        spec = changed(pipeline.sampler_of(run), steps=steps, name=sampler, spacing=spacing, eta=eta)
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
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also draw with the float model, side by side.")] = False,
    shard: Annotated[
        int | None,
        typer.Option(
            help="Images a file: they are streamed to disk, and the same command goes on after a kill. Without it one "
            f"PNG each, or of more than {PNGS} images 256 a file."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that draw shards, one thread each; as many as cores by default.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that draws the shards instead, or local.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    quiet: Quiet = False,
) -> None:
    """Run the whole denoising loop on the engine and write PNGs, a grid and samples.json, or files of many images."""
    with one_line_errors():
        import os

        import engines
        from gaq_export import pipeline
        from gaq_export.diffusion.schedule import SamplerSpec
        from gaq_export.errors import GaqError
        from gaq_export.sampling.prompts import ConditioningRequest, condition_engine

        file = engines.load_engine_file(engine)
        conditioning = condition_engine(file, ConditioningRequest(classes=classes, prompts=prompts, guidance=guidance))
        own = SamplerSpec.from_json(file.about["sampler"])
        spec = changed(own, steps=steps, name=sampler, spacing=spacing, eta=eta)
        if num > PNGS or shard is not None or workers is not None or ray is not None:
            if compare:
                raise GaqError(
                    "--compare writes one PNG an image: ask for fewer of them, without --shard or --workers."
                )
            cores = 1 if "tensorrt" in file.backend else os.cpu_count() or 1
            with terminal.Bars(quiet) as bars:
                made = pipeline.sample_shards(
                    engine,
                    num=num,
                    seed=seed,
                    batch=batch,
                    sampler=spec,
                    out=out,
                    shard=256 if shard is None else shard,
                    conditioning=conditioning,
                    workers=cores if workers is None else workers,
                    ray=ray,
                    on_images=bars.images,
                )
            warn_if_meaningless(file.about["model"]["meaningless"])
            typer.echo(f"{made.drawn} of {num} images in {made.seconds:.1f} s, sha256 {made.digest[:16]} -> {out}")
            return
        with terminal.Bars(quiet) as bars:
            drawn = pipeline.sample(
                engine,
                num=num,
                seed=seed,
                batch=batch,
                sampler=spec,
                out=out,
                compare=compare,
                conditioning=conditioning,
                on_step=bars.sample,
            )
        warn_if_meaningless(drawn.meaningless)
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
    with one_line_errors():
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
    with one_line_errors():
        from gaq_export import pipeline

        with terminal.Bars(quiet) as bars:
            path = pipeline.inspect(folder=run, out=out, block=block, images=images, on_step=bars.inspect)
        typer.echo(path)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what is installed, which backends can build and run here, and what is missing for the others."""
    with one_line_errors():
        import json

        from gaq_export.cli.doctor import checkup

        found = checkup()
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        else:
            terminal.print_checkup(found)


app.command()(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(calibrate.compare)
app.command()(calibrate.recipes)
app.command()(share.pack)
app.command()(share.push)
app.command()(share.pull)
app.command()(share.triton)


@app.command()
def models() -> None:
    """List the models known by name."""
    with one_line_errors():
        from gaq_export.models.loader import MODELS

        width = max(map(len, MODELS))
        for spec in MODELS.values():
            typer.echo(f"{spec.name:{width}}  {spec.description}")
