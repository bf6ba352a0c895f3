"""The commands that calibrate, with one recipe or several side by side, and those that list the names."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaq_export.cli import terminal
from gaq_export.cli.options import (
    DEFAULT_RUN,
    MOST_WORKERS,
    CacheName,
    CellRay,
    Classes,
    Convention,
    CorrectionRule,
    DeviceName,
    Eta,
    Guidance,
    Iterations,
    ModelArgument,
    ModelName,
    OmegaRule,
    PresetName,
    Prompts,
    Quiet,
    RequireDb,
    RunFolder,
    SamplerName,
    Spacing,
    Steps,
    Tf32,
    Trajectories,
    WeightBits,
    Weights,
    device_of,
    drawn_with,
    find_model,
    one_line_errors,
)
from gaq_export.cli.progress import Display

if TYPE_CHECKING:
    from calib.plan import QuantPlan
    from gaq_export.cluster.connection import Cluster
    from gaq_export.comparison.auto import Tried
    from gaq_export.comparison.runner import Measure
    from gaq_export.models.loader import LoadedModel
    from gaq_export.quantize.noise_sqnr import OnStage
    from gaq_export.quantize.presets import Preset

_QUANTIZATION = "Quantization"


def calibrate(
    model: ModelName = None,
    weights: Weights = None,
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    wbits: WeightBits = 4,
    abits: Annotated[
        str,
        typer.Option(
            help="Bits of an activation, 2 to 8. Of several, as in 4,8, each sampling step gets what it needs.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "8",
    preset: PresetName = "fast",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A published method, see `gaq-export recipes`; or auto: try several and keep the best. Other options "
            "take precedence over a recipe's.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    omega: OmegaRule = None,
    convention: Convention = None,
    correct: CorrectionRule = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Choose each layer's weight bits (4, 8 or float), the best that fit: 5bits (on average), 2.5MB, "
            "300Gbit-ops or 12ms (for a step of 4 images, measured here).",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of names of further layers to keep float; may be repeated.", rich_help_panel=_QUANTIZATION
        ),
    ] = None,
    per_step_ranges: Annotated[
        bool | None,
        typer.Option(
            "--per-step-ranges/--shared-ranges",
            help="Activation grids for each sampling step, or one for all steps.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--moved",
            help="Activation grids with 0 in the middle (coarser, fewer GPU kernels), or moved to the values.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    images: Trajectories = None,
    iterations: Iterations = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of everything random in the calibration.", rich_help_panel=_QUANTIZATION)
    ] = 0,
    require_db: RequireDb = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    spacing: Spacing = None,
    eta: Eta = None,
    ray: CellRay = None,
    device: DeviceName = "auto",
    tf32: Tf32 = False,
    cache: CacheName = "auto",
    run: RunFolder = DEFAULT_RUN,
    quiet: Quiet = False,
) -> None:
    """Learn integer weights and activation scales. A calibration that was stopped continues where it was."""
    with one_line_errors():
        from dataclasses import replace

        from gaq_export import pipeline
        from gaq_export.comparison import auto
        from gaq_export.errors import GaqError
        from gaq_export.quantize import presets
        from gaq_export.quantize.make_plan import CalibrationCallbacks
        from gaq_export.quantize.verdict import judge

        if ray is not None and recipe != "auto":
            raise GaqError("--ray spreads the candidates of --recipe auto over a cluster: leave it out otherwise.")
        # On a cluster the device is one of its workers', and this machine may lack it.
        place = device_of(device, tf32, cache) if ray is None else None
        options = presets.CalibrationOptions(
            wbits=wbits,
            abits=presets.parse_widths(abits),
            omega=omega,
            convention=convention,
            correction=correct,
            budget=budget,
            keep_float=tuple(keep_float or ()),
            per_step=per_step_ranges,
            symmetric=symmetric,
            iterations=iterations,
            seed=seed,
        )

        def settings(recipe: str | None) -> "Preset":
            chosen = presets.preset(preset, replace(options, recipe=recipe))
            return presets.with_images(chosen, images, loaded.spec.images)

        with Display(quiet) as display:
            display.stage("loading the model")
            loaded = find_model(model, weights, classes, prompts, guidance)
            loaded = drawn_with(loaded, name=sampler, steps=steps, spacing=spacing, eta=eta)
            if place is not None:
                loaded = loaded.on(place)
            calibrate_with = partial(
                pipeline.calibrate,
                callbacks=CalibrationCallbacks(
                    on_collect=display.collect, on_progress=display.calibrate, on_correct=display.correct
                ),
            )
            best = recipe
            # The winner's run folder is the run by then, so the last call only reads its plan.
            if recipe == "auto":
                candidates = {name: settings(name) for name in auto.CANDIDATES}
                if ray is None:
                    tried = auto.choose(loaded, candidates, run, partial(calibrate_with, loaded), display.measure)
                else:
                    loaded, tried = _choose_on(
                        ray, partial(_on_cluster, loaded, device, tf32), candidates, run, display.measure
                    )
                typer.echo(auto.explain(tried))
                best = tried[0].recipe
            plan = calibrate_with(loaded, settings(best), folder=run)
            verdict = judge(run, loaded, display.measure)
        typer.echo(f"{_bits_of(plan, wbits, abits, mixed=budget is not None)} -> {run}/plan.safetensors")
        terminal.print_verdict(verdict, quiet)
        terminal.require(verdict, require_db)
        if not quiet:
            typer.echo("next: gaq-export build-engine" + ("" if run == DEFAULT_RUN else f" --run {run}"))


def compare(
    model: ModelArgument = None,
    weights: Weights = None,
    classes: Classes = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes with commas between them, see `gaq-export recipes`; by default all.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "",
    wbits: WeightBits = 4,
    abits: Annotated[
        int, typer.Option(min=2, max=8, help="Bits of an activation, 2 to 8.", rich_help_panel=_QUANTIZATION)
    ] = 8,
    bits: Annotated[
        str,
        typer.Option(
            help="Several settings, as in W8A8,W4A8, in place of --wbits and --abits.", rich_help_panel=_QUANTIZATION
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Calibrations with each recipe.", rich_help_panel=_QUANTIZATION)
    ] = 1,
    preset: PresetName = "fast",
    iterations: Iterations = None,
    calibration_images: Trajectories = None,
    images: Annotated[int, typer.Option(min=0, max=1_000_000, help="Images that each network draws; 0 for none.")] = 64,
    data: Annotated[Path | None, typer.Option(help=".npz of real images, for Frechet distances.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Checkpoint of a ResNet-56 that makes the features of three-channel images.")
    ] = None,
    sampler: SamplerName = None,
    steps: Steps = None,
    spacing: Spacing = None,
    eta: Eta = None,
    folder: Annotated[Path, typer.Option(help="Folder of results, so that the command can continue.")] = Path(
        "gaq-compare"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; by default --folder.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MOST_WORKERS, help="Calibrations at a time, one thread each; by default 1.")
    ] = None,
    ray: CellRay = None,
    device: DeviceName = "auto",
    tf32: Tf32 = False,
    cache: CacheName = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the pages from the results that exist.")
    ] = False,
    # For the processes that `runner` starts with this same command.
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
    quiet: Quiet = False,
) -> None:
    """Calibrate with several recipes and compare the results. Finished calibrations are kept."""
    with one_line_errors():
        from gaq_export import folders
        from gaq_export.comparison import pages as comparison_pages
        from gaq_export.comparison import runner, spec
        from gaq_export.comparison.yardstick import Yardstick
        from gaq_export.errors import GaqError
        from gaq_export.quantize.recipes import RECIPES

        if ray is not None and workers is not None:
            raise GaqError("--workers and --ray exclude each other: a cluster runs as many as it has GPUs or cores.")
        # On a cluster the device is one of its workers', and this machine may lack it.
        place = device_of(device, tf32, cache) if ray is None else None
        with Display(quiet) as display, ExitStack() as stack:
            display.stage("loading the model")
            loaded = find_model(model, weights, classes, prompts, guidance)
            loaded = drawn_with(loaded, name=sampler, steps=steps, spacing=spacing, eta=eta)
            measure = None
            if ray is not None:
                loaded, measure = _measured_on(stack, ray, partial(_on_cluster, loaded, device, tf32))
            elif place is not None:
                loaded = loaded.on(place)
            comparison = spec.Comparison(
                yardstick=Yardstick(model=loaded, folder=folder, images=images, data=data, classifier=features),
                preset=spec.adjusted_preset(preset, iterations, calibration_images),
                rows=spec.recipe_rows(recipes.split(",") if recipes else list(RECIPES)),
                bits=spec.parse_bits(bits or f"W{wbits}A{abits}"),
                seeds=tuple(range(seeds)),
                workers=workers or 1,
            )
            pages = comparison_pages.page_paths(out or folder, loaded.spec.name)
            taken = [file for file in (data, features, loaded.source.path) if file is not None and file.is_file()]
            folders.check_outputs([pages.html, pages.markdown], taken)
            # For the page, as the user typed it: whoever reads it can repeat it.
            command = comparison_pages.command_line(sys.argv[1:])
            # Each calibration is a process that this one starts, after one that prepares what all of them need.
            jobs = 1 if job or report_only else 1 + len(runner.missing(comparison))
            finished = 0
            display.measure(job or "calibrations", finished, jobs)

            def say(line: str) -> None:
                nonlocal finished
                finished += 1
                if not quiet:
                    typer.echo(line)
                display.measure("calibrations", finished, jobs)

            write = partial(comparison_pages.write_pages, comparison, command, pages)
            runner.execute(comparison, job, report_only, write, say, measure)
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


def models() -> None:
    """List the models known by name."""
    with one_line_errors():
        from gaq_export.models.registry import MODELS

        width = max(map(len, MODELS))
        for spec in MODELS.values():
            typer.echo(f"{spec.name:{width}}  {spec.description}")


def _choose_on(
    address: str,
    place: Callable[["Cluster"], "LoadedModel"],
    candidates: Mapping[str, "Preset"],
    folder: Path,
    on_step: "OnStage",
) -> tuple["LoadedModel", list["Tried"]]:
    """Choose a recipe on a Ray cluster; return the model, which says where it was calibrated, and all results."""
    from gaq_export.cluster.connection import connected
    from gaq_export.comparison import on_cluster

    with connected(address) as cluster:
        model = place(cluster)
        return model, on_cluster.choose(model, candidates, folder, cluster, on_step)


def _measured_on(
    stack: ExitStack, address: str, place: Callable[["Cluster"], "LoadedModel"]
) -> tuple["LoadedModel", "Measure"]:
    """Return the model, which says where its cells compute, and what measures them on a Ray cluster."""
    from gaq_export.cluster.connection import connected
    from gaq_export.comparison import on_cluster

    cluster = stack.enter_context(connected(address))
    return place(cluster), partial(on_cluster.run, cluster=cluster)


def _on_cluster(model: "LoadedModel", device: str, tf32: bool, cluster: "Cluster") -> "LoadedModel":
    """Return the model, still on the host, which says on what its cells compute."""
    from dataclasses import replace

    from gaq_export.comparison import on_cluster

    return replace(model, device=on_cluster.find_place(device, cluster, tf32=tf32))


def _bits_of(plan: "QuantPlan", wbits: int, abits: str, *, mixed: bool) -> str:
    """Return what a finished plan is, as "W4A8: 39 layers quantized, 12 stay float"."""
    weights = f"mixed ({_count(layer.weight_bits for layer in plan.layers.values())}) " if mixed else f"W{wbits}"
    activations = f"A{abits}"
    if plan.step_bits is not None:
        activations = f"A{abits.replace(',', '/')} ({_count(plan.step_bits.bits)} steps)"
    return f"{weights}{activations}: {len(plan.layers)} layers quantized, {len(plan.float_layers)} stay float"


def _count(widths: Iterable[int]) -> str:
    """Return how many have which number of bits, as "3 x 4 bits, 1 x 8 bits"."""
    return ", ".join(f"{count} x {bits} bits" for bits, count in sorted(Counter(widths).items()))
