"""The commands that calibrate: one model with one recipe, or with several side by side."""

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaq_export.cli import terminal
from gaq_export.cli.options import (
    Classes,
    Eta,
    Guidance,
    Prompts,
    Quiet,
    RunFolder,
    SamplerName,
    Spacing,
    Steps,
    Weights,
    changed,
    find_model,
    one_line_errors,
)

if TYPE_CHECKING:
    from calib.plan import QuantPlan
    from gaq_export.quantize.presets import Preset


def calibrate(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A name from `gaq-export models`.")] = None,
    weights: Weights = None,
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    wbits: Annotated[int, typer.Option(help="Weight bits, 2 to 8.")] = 4,
    abits: Annotated[
        str, typer.Option(help="Activation bits, 2 to 8; of several, as 4,8, each sampling step takes what it needs.")
    ] = "8",
    preset: Annotated[
        str, typer.Option(envvar="GAQ_EXPORT_PRESET", help="tiny (smoke test), fast (minutes) or paper (as published).")
    ] = "fast",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A published method, see `gaq-export recipes`, or auto: several, of which the best is kept. Options "
            "beside it take precedence."
        ),
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
            help="Bits of each layer's own: 4, 8 or float, the best within 5bits (on average), 2.5MB, 300Gbit-ops or "
            "12ms (a step of 4 images, measured here)."
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
    with one_line_errors():
        from dataclasses import replace

        from gaq_export import pipeline
        from gaq_export.comparison import auto
        from gaq_export.quantize import presets

        def chosen(recipe: str | None) -> "Preset":
            made = pipeline.preset(
                preset,
                wbits=wbits,
                abits=presets.parse_widths(abits),
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
            fitting = made.config.reconstruction
            if iterations is not None:
                fitting = replace(fitting, iterations=iterations)
            made = replace(made, config=replace(made.config, reconstruction=fitting))
            return presets.of_images(made, images, loaded.spec.images)

        loaded = find_model(model, weights, classes, prompts, guidance)
        with terminal.Bars(quiet) as bars:
            learn = partial(
                pipeline.calibrate,
                loaded,
                on_collect=bars.collect,
                on_progress=bars.calibrate,
                on_correct=bars.correct,
            )
            if recipe == "auto":
                tried = auto.choose(loaded, {name: chosen(name) for name in auto.CANDIDATES}, run, learn, bars.inspect)
                typer.echo(auto.explain(tried))
            plan = learn(chosen(tried[0].recipe if recipe == "auto" else recipe), folder=run)
        counts = f"{len(plan.layers)} layers quantized, {len(plan.float_layers)} stay float"
        own = plan.step_bits and f"{_counted(plan.step_bits.bits)} steps"
        widths = f"W{wbits}" if budget is None else f"mixed ({_counted(_weight_bits(plan))}) "
        widths += f"A{abits}" if own is None else f"A{abits.replace(',', '/')} ({own})"
        typer.echo(f"{widths}: {counts} -> {run}/plan.safetensors")
        if not quiet:
            typer.echo("next: gaq-export build-engine" + ("" if run == Path("gaq-run") else f" --run {run}"))


def compare(
    model: Annotated[str | None, typer.Argument(help="A name from `gaq-export models`.")] = None,
    weights: Weights = None,
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    recipes: Annotated[
        str, typer.Option(help="Names with commas between them, see `gaq-export recipes`; all if empty.")
    ] = "",
    wbits: Annotated[int, typer.Option(help="Weight bits, 2 to 8.")] = 4,
    abits: Annotated[int, typer.Option(help="Activation bits, 2 to 8.")] = 8,
    bits: Annotated[str, typer.Option(help="Several settings, as W8A8,W4A8, in place of the two above.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Calibrations of each recipe.")] = 1,
    preset: Annotated[str, typer.Option(envvar="GAQ_EXPORT_PRESET", help="tiny, fast or paper.")] = "fast",
    iterations: Annotated[int | None, typer.Option(help="Iterations a block, instead of the preset's.")] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Trajectories to calibrate with, instead of the preset's.")
    ] = None,
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
    with one_line_errors():
        from gaq_export.comparison import pages as comparing
        from gaq_export.comparison import runner, spec
        from gaq_export.quantize.recipes import RECIPES

        loaded = find_model(model, weights, classes, prompts, guidance)
        bench = comparing.comparison(
            loaded,
            recipes.split(",") if recipes else list(RECIPES),
            spec.schedule(preset, iterations, calibration_images),
            bits=spec.parse_bits(bits or f"W{wbits}A{abits}"),
            seeds=seeds,
            folder=folder,
            images=images,
            sampler=changed(loaded.spec.sampler, name=sampler, steps=steps, spacing=spacing, eta=eta),
            data=data,
            features=features,
            workers=workers,
        )
        name = f"compare-{loaded.spec.name}"
        pages = comparing.Pages(html=(out or folder) / f"{name}.html", markdown=(out or folder) / f"{name}.md")
        command = comparing.command_line(sys.argv[1:])
        runner.execute(bench, job, report_only, lambda: comparing.write_pages(bench, command, pages), typer.echo)
        if not job:
            typer.echo(f"-> {pages.html}")


def recipes() -> None:
    """List the published methods that `calibrate --recipe` knows."""
    with one_line_errors():
        from gaq_export.comparison import auto
        from gaq_export.quantize.recipes import RECIPES

        for name, recipe in RECIPES.items():
            typer.echo(f"{name:14} {recipe.description}")
        typer.echo(f"{'auto':14} the best of {', '.join(auto.CANDIDATES)} by the noise they predict")


def _weight_bits(plan: "QuantPlan") -> list[int]:
    return [layer.weight_bits for layer in plan.layers.values()]


def _counted(widths: Sequence[int]) -> str:
    """Say how many have which bits."""
    return ", ".join(f"{count} x {bits} bits" for bits, count in sorted(Counter(widths).items()))
