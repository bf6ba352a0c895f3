"""The commands that turn a plan into something to run: an engine, or the ONNX graph alone."""

from pathlib import Path
from typing import Annotated

import typer

from gaq_export.cli import terminal
from gaq_export.cli.choices import BACKENDS, COMPUTE, NUMBERS, PORTABLE
from gaq_export.cli.options import (
    DEFAULT_RUN,
    EngineDevice,
    Eta,
    GraphKind,
    Profile,
    Quiet,
    RequireDb,
    RunFolder,
    SamplerName,
    Spacing,
    Steps,
    one_line_errors,
    replace_options,
)
from gaq_export.cli.progress import Display


def build_engine(
    run: RunFolder = DEFAULT_RUN,
    weights: Annotated[
        Path | None,
        typer.Option(help="A pack, see `gaq-export pack`: its plan is put in the run folder, and built."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"{BACKENDS}; by default the best of those that work here, see `gaq-export doctor`. onnxruntime-cuda "
            "has no INT8 convolutions: it rounds as the others do and computes in FP16."
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
        list[str] | None,
        typer.Option(help="GPU generation such as sm89, may be repeated (tensorrt-rtx only); by default portable."),
    ] = None,
    portable: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What else the engine is to run: {PORTABLE}, may be repeated. version: later TensorRT versions "
            "(tensorrt); gpu: all GPUs from Ampere on (tensorrt, tensorrt-rtx). The audit says what it costs."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads (openvino, onnxruntime).")] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help=f"Arithmetic of everything that is not quantized: {COMPUTE}. By default float16 with TensorRT, "
            "float32 elsewhere."
        ),
    ] = None,
    numbers: Annotated[
        str,
        typer.Option(help=f"What to quantize to: {NUMBERS}. fp8 is E4M3, for TensorRT on sm89 and later."),
    ] = "int8",
    correction: Annotated[
        bool,
        typer.Option("--correction/--no-correction", help="Whether to apply the plan's noise correction, if any."),
    ] = True,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="Leave the weights in an ONNX file beside the engine (TensorRT; building it needs a GPU).",
        ),
    ] = False,
    timing: Annotated[
        bool | None,
        typer.Option(
            "--timing/--no-timing",
            help="Whether to time a float engine of the backend beside it, some seconds; by default up to 1 GiB of "
            "float weights.",
        ),
    ] = None,
    device: EngineDevice = "auto",
    require_db: RequireDb = None,
    quiet: Quiet = False,
) -> None:
    """Emit the quantized graph, build an engine from it, audit its layers and check it against PyTorch."""
    with one_line_errors():
        import engines
        from engines.files import files_of
        from gaq_export import folders, pipeline
        from gaq_export.deploy.build import BuildOptions, build
        from gaq_export.deploy.record import GraphKind, Numbers, parse_choice
        from gaq_export.devices import gpu_number
        from gaq_export.errors import GaqError
        from gaq_export.quantize.verdict import judge
        from gaq_export.run import Run

        try:
            smallest, best, largest = (int(n) for n in batch.split(","))
        # Too few or too many numbers are a ValueError too.
        except ValueError:
            raise GaqError(f"--batch {batch!r}: give three numbers, such as 1,4,16.") from None
        gpu = gpu_number(device)
        # `best_backend` is not the option's default, since it depends on the machine, and the help text must not.
        config = engines.EngineConfig(
            backend=backend or engines.best_backend(gpu),
            batch=(smallest, best, largest),
            targets=tuple(target or ()),
            portable=tuple(portable or ()),
            threads=threads,
            compute=compute,
            stripped=strip_weights,
            gpu=gpu,
        )
        # First of all, since the plan of a pack says which sampler is the default.
        if weights is not None:
            from gaq_export.sharing import pack

            folders.check_outputs(files_of(out), [weights])
            pack.unpack(weights, Run(folder=run))
        spec = replace_options(pipeline.sampler_of(run), steps=steps, name=sampler, spacing=spacing, eta=eta)
        options = BuildOptions(
            config=config,
            graph=parse_choice("graph", graph, GraphKind),
            sampler=spec,
            numbers=parse_choice("numbers", numbers, Numbers),
            correct=correction,
            timing=timing,
        )
        with Display(quiet) as display:
            if require_db is not None:  # before the build, so that a plan that is not good enough replaces no engine
                terminal.require(judge(run, on_step=display.measure), require_db)
            built = build(Run(folder=run), out, options, on_begin=display.stage)
            verdict = judge(run, on_step=display.measure)
        if not quiet:
            terminal.print_audit(built)
        terminal.print_verdict(verdict, quiet)
        typer.echo(
            f"{config.backend} engine -> {out} ({out.stat().st_size / 1e6:.1f} MB, {built.file.build_seconds:.1f} s)"
        )
        if not quiet and built.not_run is None:
            typer.echo(f"next: gaq-export sample --engine {out}")


def export(
    run: RunFolder = DEFAULT_RUN,
    profile: Profile = "reference",
    graph: GraphKind = "step",
    out: Annotated[Path | None, typer.Option(help="ONNX file; by default in the run folder.")] = None,
) -> None:
    """Write the quantized ONNX graph alone, for other tools."""
    with one_line_errors():
        from gaq_export import pipeline

        typer.echo(pipeline.export_onnx(profile, graph=graph, folder=run, out=out).path)
