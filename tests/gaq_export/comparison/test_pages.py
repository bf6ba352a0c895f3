"""A comparison of recipes from the command line: two pages, kept results, and one line where something is wrong."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from calib.files import write_atomically
from gaq_export.comparison import pages, runner
from gaq_export.comparison.pages import command_line, page_paths, write_pages
from gaq_export.comparison.spec import Comparison
from tests.gaq_export.commands import refused
from tests.gaq_export.hostile_names import check_html, check_markdown


@pytest.fixture(scope="module")
def compared(home: Path, tmp_path_factory) -> Path:
    """A finished comparison of two recipes, one of which corrects the sampler."""
    folder = tmp_path_factory.mktemp("compared") / "results"
    run(home, folder, "rtn,ptqd")
    return folder


def run(home: Path, folder: Path, recipes: str) -> str:
    command = ["compare", "--weights", str(home), "--recipes", recipes, "--bits", "W4A8,W4A4", "--preset", "tiny"]
    command += ["--images", "2", "--eta", "1", "--steps", "4", "--folder", str(folder), "--workers", "2"]
    done = subprocess.run([sys.executable, "-m", "gaq_export", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_pages_show_every_recipe_at_every_setting(compared: Path) -> None:
    (markdown,), (page,) = compared.glob("*.md"), compared.glob("*.html")
    text = markdown.read_text(encoding="utf-8")
    assert text.count("\n| `rtn` |") == text.count("\n| `ptqd` |") == 2
    assert "Not measured" not in text
    for line in re.findall(r"^\| `ptqd` \|.*", text, re.MULTILINE):
        assert " - " not in line
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (compared / name).stat().st_size > 1000
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == html.count("data:image/png;base64") == 2
    assert not re.search(r'(src|href)="http', html)


def test_what_is_there_is_kept_and_another_recipe_added(compared: Path, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (compared / "cells").glob("*.json")}
    assert len(before) == 2
    said = run(home, compared, "rtn,adaround")
    assert "adaround-w4-seed0: done" in said
    assert "rtn" not in said
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_a_recipe_that_does_not_exist_and_other_settings_are_refused(compared: Path, home: Path) -> None:
    words = ("compare", "--weights", home, "--folder", compared)
    assert "Unknown recipe 'rtm'" in refused(compared, *words, "--recipes", "rtm")
    assert "holds results with other settings" in refused(compared, *words, "--recipes", "rtn", "--images", 5)


def test_workers_and_ray_exclude_each_other(home: Path, tmp_path: Path) -> None:
    words = ("compare", "--weights", home, "--folder", tmp_path, "--workers", 2, "--ray", "local")
    assert "--workers and --ray exclude each other" in refused(tmp_path, *words)


def test_the_command_shown_names_no_folders_from_elsewhere() -> None:
    words = ["compare", "ddpm-mnist", "--data", "/a/b/mnist.npz", "--report-only", "--folder=/c/d"]
    assert command_line(words) == "gaq-export compare ddpm-mnist --data mnist.npz --folder=d"
    assert runner.SHOWN > 1


def test_a_models_name_is_shown_and_neither_obeyed_nor_followed(
    measured: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: SimpleNamespace(description="a row") for name in measured.rows}
    monkeypatch.setattr(pages, "RECIPES", rows)
    monkeypatch.setattr(pages, "_draw_grid", lambda comparison, table, bits, path: write_atomically(path, b"PNG"))

    def written(name: str) -> tuple[str, str]:
        model = replace(measured.model, spec=replace(measured.model.spec, name=name))
        renamed = replace(measured, yardstick=replace(measured.yardstick, model=model))
        paths = page_paths(tmp_path / "pages", name)
        assert paths.html.parent == tmp_path / "pages"
        write_pages(renamed, f"gaq-export compare {name}", paths)
        return paths.markdown.read_text(encoding="utf-8"), paths.html.read_text(encoding="utf-8")

    for name in ("</pre><img src='x'>\n# heading\u202e\x1b", "../../up | [x](y) `z` *w* $\\frac{"):
        check_markdown(lambda name: written(name)[0], name)
        check_html(lambda name: written(name)[1], name)
    assert {path.name for path in tmp_path.iterdir()} == {"pages", "bench"}
