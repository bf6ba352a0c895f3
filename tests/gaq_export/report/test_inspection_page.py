"""The page: every section, HTML that parses, nothing from elsewhere, the same bytes for the same run."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from typer.testing import CliRunner

from calib.config import OmegaConfig, QuantConfig
from calib.diagnose import Agreement, Alignment, Cosines
from calib.plan import Grid, LayerQuant, QuantPlan, load_plan
from calib.reconstruct import BlockResult
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.diffusion.schedule import SamplerSpec, linear_schedule
from gaq_export.models.provenance import Provenance
from gaq_export.quantize.noise_sqnr import NoiseSqnr
from gaq_export.report import charts
from gaq_export.report.inspection import Inspection, LayerRange
from gaq_export.report.inspection_page import Origin, render
from tests.gaq_export.outline import outline

TITLES = [
    "Do the sampling steps pull the same way?",
    "Do the sample weights follow the gradients?",
    "What did learning the rounding gain?",
    "How close is the predicted noise?",
    "Which layers cost the most?",
    "How far do the grids reach?",
]
NASTY = "<script>&\"'"


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory) -> str:
    """The page of the tiny run, from the command line."""
    out = tmp_path_factory.mktemp("page") / "new" / "inspect.html"
    result = CliRunner().invoke(app, ["inspect", str(tiny_run), "--out", str(out), "--images", "2"])
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert [p.name for p in out.parent.iterdir()] == ["inspect.html"]
    return out.read_text(encoding="utf-8")


def small(**changes: object) -> QuantPlan:
    """Return a plan of two blocks, the names of model and second block full of mark-up."""
    layer = LayerQuant(
        codes=torch.ones(2, 2, dtype=torch.int8),
        weight_scale=torch.ones(2),
        weight_bits=4,
        input=Grid(scale=1.0, bits=8),
        output_scale=1.0,
    )
    provenance = Provenance(
        name=NASTY,
        source="module",
        fingerprint="f" * 64,
        shape=(1, 8, 8),
        classes=None,
        random_weights=True,
        architecture={},
        sampler=SamplerSpec(steps=3, eta=0.5),
        schedule=linear_schedule(num_train=100),
    )
    blocks = (
        BlockResult(name="first", layers=("first",), loss_before=2.0, loss_after=0.5, rounding="adaround"),
        BlockResult(name=NASTY, layers=(NASTY,), loss_before=0.1, loss_after=0.1, rounding="nearest"),
    )
    plan = QuantPlan(
        layers={"first": layer, NASTY: layer},
        products={},
        float_layers={},
        num_train=100,
        blocks=blocks,
        scores=torch.arange(6.0),
        config=QuantConfig(keep_float=(NASTY,)),
        provenance=provenance.to_json(),
    )
    return dataclasses.replace(plan, **changes)


def measured(**changes: object) -> Inspection:
    """Return numbers to go with `small`."""
    held = Cosines(matrix=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), halves=None)
    seen = Agreement(block=NASTY, steps=(0, 2), samples=3, before=held, after=held)
    span = LayerRange(name=NASTY, channels=2, weight_bits=4, covered=(0.5, 0.75, 1.0), input_bits=8, input_reach=127.0)
    decibels = torch.tensor([[30.0, 32.0], [20.0, 24.0], [10.0, 11.0]])
    found = Inspection(
        train=6,
        validation=2,
        overview=(seen,),
        agreement=seen,
        alignment=Alignment(block=NASTY, validation=2, omega=torch.softmax(torch.arange(6.0), 0), inner=torch.ones(6)),
        noise=NoiseSqnr(t=torch.tensor([66, 33, 0]), weights=decibels + 5, both=decibels),
        sensitivity={"first": 2e-3, NASTY: 5e-4},
        ranges=(span, span),
    )
    return dataclasses.replace(found, **changes)


ORIGIN = Origin(
    settings={"images": 4},
    journal={"step": "calibrate", "when": NASTY, "version": "0.0.9", "collect_seconds": 1.5, "peak_memory": "2 GB"},
)


def test_the_page_holds_every_section_and_figure(page: str, tiny_run: Path) -> None:
    seen = outline(page)
    worst = max(load_plan(tiny_run / "plan.safetensors").blocks, key=lambda b: b.loss_before).name
    assert f"Block {worst}, 2 layers; 6 training samples, 3 at each of 2 steps" in seen.text
    assert f"Block {worst}, gradients with respect to" in seen.text
    assert seen.titles == TITLES
    assert seen.seen["svg"] == seen.seen["figure"] == seen.seen["figcaption"] == 6
    assert "6 training samples in 6 bins, 2 validation samples" in seen.text
    assert "2 images from seeds that calibration did not use, 50 steps" in seen.text
    assert "39 layers, " in seen.text
    assert seen.seen["tr"] == 1 + 14 + 1 + 39  # two tables with a head each: blocks and layers


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    seen = outline(page)
    assert seen.seen["script"] == seen.seen["link"] == seen.seen["iframe"] == 0
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert re.findall(r"url\((?!#)|@import", page) == []
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_every_id_is_used_once_and_every_reference_leads_to_one(page: str) -> None:
    ids = Counter(value for name, value in outline(page).attributes if name == "id")
    assert [name for name, count in ids.items() if count > 1] == []
    assert {name.partition("-")[0] for name in ids} == {
        "cosines",
        "alignment",
        "losses",
        "plan",
        "sensitivity",
        "ranges",
    }
    wanted = re.findall(r"(?:href=\"|url\()#([^\")]+)", page)
    assert wanted
    assert set(wanted) <= set(ids)


def test_the_same_run_gives_the_same_bytes_whatever_matplotlib_is_set_to(
    page: str, tiny_run: Path, tiny_model, tmp_path: Path
) -> None:
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        again = pipeline.inspect(folder=tiny_run, out=tmp_path / "again.html", images=2, model=tiny_model)
        assert (mpl.rcParams["lines.linewidth"], mpl.rcParams["font.size"]) == (9, 30)
    assert again.read_text(encoding="utf-8") == page


def test_whatever_a_plan_says_is_escaped() -> None:
    page = render(small(), measured(), ORIGIN)
    seen = outline(page)
    assert seen.seen["script"] == 0
    assert f"{NASTY}, W4A8" in seen.text
    assert seen.text.count(NASTY) > 8  # title, heading, model, patterns, date, settings, captions, tables, figures
    assert seen.seen["svg"] == 6


def test_the_header_says_what_was_done_and_with_what() -> None:
    text = " ".join(outline(render(small(), measured(), ORIGIN)).text.split())
    for fact in ("ddim, 3 steps, uniform spacing, eta 0.5", "4 images; 6 training and 2 validation", "1.5 s", "2 GB"):
        assert fact in text
    assert "2, 1 of them rounded to nearest" in text
    assert "gaq-export 0.0.9; this page: gaq-export" in text
    assert f"torch {torch.__version__}" in text
    assert "The weights are random: every figure is about noise." in text


def test_a_block_where_nearest_was_kept_is_marked() -> None:
    assert "1 kept nearest" in render(small(), measured(), ORIGIN)
    assert "nearest kept" in charts.losses(small().blocks)
    assert "nearest kept" not in charts.losses(small().blocks[:1])


def test_equal_scores_are_said_to_be_uniform() -> None:
    plan = small(scores=torch.full((6,), 1 / 32), config=QuantConfig(omega=OmegaConfig(rule="uniform")))
    seen = outline(render(plan, measured(alignment=None), ORIGIN))
    assert "The sample weights are uniform: all 6 scores are equal" in seen.text
    assert seen.titles == TITLES
    assert seen.seen["svg"] == 5


def test_a_plan_without_losses_or_blocks_still_gives_a_page() -> None:
    nearest = tuple(
        dataclasses.replace(b, loss_before=None, loss_after=None, rounding="nearest") for b in small().blocks
    )
    seen = outline(render(small(blocks=nearest), measured(alignment=None), ORIGIN))
    assert "The plan holds no block losses: every layer is rounded to nearest." in seen.text
    assert seen.seen["svg"] == 4
    seen = outline(render(small(blocks=()), measured(agreement=None, alignment=None, overview=()), ORIGIN))
    assert "No block of this plan can be measured alone." in seen.text
    assert (seen.titles, seen.seen["svg"]) == (TITLES, 3)
