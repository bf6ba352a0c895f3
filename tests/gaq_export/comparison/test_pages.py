"""A comparison of recipes from the command line: two pages, kept results, and one line where something is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gaq_export.comparison import runner
from gaq_export.comparison.pages import command_line
from tests.gaq_export.commands import refused


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


def test_the_command_shown_names_no_folders_from_elsewhere() -> None:
    words = ["compare", "ddpm-mnist", "--data", "/a/b/mnist.npz", "--report-only", "--folder=/c/d"]
    assert command_line(words) == "gaq-export compare ddpm-mnist --data mnist.npz --folder=d"
    assert runner.SHOWN > 1
