"""The page of a report: everything of an engine, in a browser as on paper."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import EngineFile
from gaq_export.cli.app import app
from tests.gaq_export import browser
from tests.gaq_export.outline import outline
from tests.gaq_export.report.test_report import write_scores

TITLES = [
    "Does it draw the same pictures?",
    "What do metrics of many pictures say?",
    "Does it predict the same noise?",
    "Is it smaller?",
    "What does it compute in?",
    "Is it faster?",
    "Do the sampling steps pull the same way?",
    "Do the sample weights follow the gradients?",
    "What did learning the rounding gain?",
    "How close is the predicted noise?",
    "Which layers cost the most?",
    "How far do the grids reach?",
    "How to make it again",
]


@pytest.fixture(scope="module")
def page(tiny_run: Path, tiny_step_engine: EngineFile, tmp_path_factory) -> str:
    """The report of the tiny run, from the command line."""
    folder = tmp_path_factory.mktemp("report")
    words = ["report", str(tiny_run), "--engine", str(tiny_step_engine.path), "--images", "3", "--rounds", "2"]
    words += [
        "--evaluation",
        str(write_scores(tiny_step_engine, folder / "scores")),
        "--out",
        str(folder / "report.html"),
    ]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (0, f"{folder / 'report.html'}\n"), result.output
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "scores"]
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_everything_and_needs_nothing_else(page: str) -> None:
    seen = outline(page)
    assert seen.titles == TITLES
    assert seen.seen["svg"] == 7
    assert seen.seen["img"] == 3
    assert seen.seen["script"] == seen.seen["link"] == seen.seen["iframe"] == 0
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = " ".join(seen.text.split())
    assert "seed 2: " in text
    assert "2 [1, 3], floor 0.5" in text
    assert "features eyes (222222222222); reference real, 16 images" in text
    assert "they took turns, 2 rounds after a warm-up" in text
    assert "openvino, float" in text
    assert "against the float network, on 2 held-out trajectories: predicted noise " in text
    assert "is poor (under 20 dB)" in text  # random weights


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_browser_shows_all_of_it(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    seen = browser.look(page, tmp_path, width=width, dark=dark)
    assert seen["complaints"] == []
    assert (seen["images"], seen["figures"]) == (3, 7)
    assert seen["width"] <= width
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[what]))) for what in ("paper", "ink"))
    assert (paper < ink) == dark


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_complains_of_a_page_that_is_not_whole(tmp_path: Path) -> None:
    broken = '<meta charset="utf-8"><p>words</p><img src="data:image/png;base64,AAAA"><script>absent()</script>'
    seen = browser.look(broken, tmp_path, width=400)
    assert seen["images"] == 0
    assert len(seen["complaints"]) == 1
    assert "absent is not defined" in seen["complaints"][0]
