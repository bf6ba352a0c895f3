"""Compare recipes from Python: one calibration after the other in this process, then the pages.

The command `gaq-export compare` measures the same cells with a process for each, so that several run at a time and each
has a peak memory that is its alone. Either continues what the other has measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gaq_export.comparison import runner
from gaq_export.comparison.pages import PagePaths, page_paths, write_pages
from gaq_export.comparison.spec import Bits, Comparison, claim, recipe_rows
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.models.conditioning_request import condition_model
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import PRESETS, Preset
from gaq_export.quantize.recipes import RECIPES


def compare(
    model: LoadedModel,
    recipes: Sequence[str] = tuple(RECIPES),
    *,
    preset: Preset = PRESETS["fast"],
    bits: Sequence[Bits] = ((4, 8),),
    seeds: Sequence[int] = (0,),
    images: int = 64,
    folder: str | Path = "gaq-compare",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> PagePaths:
    """Calibrate with each recipe, measure the results alike, and write the pages; the same call again continues.

    Args:
        model: the float model; one that takes classes, and has no conditioning, draws all of them.
        recipes: names of recipes, keys of `RECIPES`.
        preset: how long to calibrate; each recipe changes it.
        bits: pairs of weight and activation bits, a table each.
        seeds: calibrations with each recipe.
        images: images that each network draws; 0 for none.
        folder: where results and pages are written.
        on_step: called with (done, total) calibrations.

    Returns:
        Where the pages are.

    Raises:
        GaqError: an unknown recipe, or a folder with results of other settings.
    """
    folder = Path(folder)
    model = condition_model(model)
    comparison = Comparison(
        yardstick=Yardstick(model=model, folder=folder, images=images),
        preset=preset,
        rows=recipe_rows(recipes),
        bits=tuple(bits),
        seeds=tuple(seeds),
        workers=1,
    )
    claim(comparison)  # first, so that nothing is measured into a folder of another comparison
    _measure(comparison, on_step)
    pages = page_paths(folder, model.spec.name)
    write_pages(comparison, f"gaq_export.compare(model, {list(recipes)})", pages)
    return pages


def _measure(comparison: Comparison, on_step: Callable[[int, int], None]) -> None:
    """Measure every cell that is missing, one after the other in this process."""
    todo = runner.missing(comparison)
    threads = torch.get_num_threads()  # a job takes one, so that its results do not depend on the machine's cores
    try:
        runner.work(comparison, runner.PREPARE)
        for done, cell in enumerate(todo, start=1):
            runner.work(comparison, cell.name)
            on_step(done, len(todo))
    finally:
        torch.set_num_threads(threads)
