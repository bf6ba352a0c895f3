"""The README is true: its links lead somewhere, its commands exist, and its Python example runs."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from gaq_export.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_relative_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_option_in_a_command_line_exists() -> None:
    lines = re.findall(r"^gaq-export ([a-z-]+)(.*?)(?:#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    commands = get_command(app).commands
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_the_first_screen_has_the_two_commands() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first


def test_the_python_example_runs(make_foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two changes: a network is given, and the schedule is the smoke test's."""
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line and not line.startswith("from")]) <= 10
    example = code[1].replace('"fast"', '"tiny"').replace("steps=25", "steps=4")
    assert example != code[1]
    monkeypatch.chdir(tmp_path)
    names = {"MyDenoiser": make_foreign}
    exec(example, names)
    assert names["images"].shape == (16, 1, 16, 16)
