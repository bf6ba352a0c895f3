"""The command line as a whole: its version, its help, and a help text for every option."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.core import TyperOption
from typer.main import get_command

import gaq_export
from gaq_export.cli.app import app
from tests.gaq_export.commands import gaq, refused

COMMANDS = get_command(app).commands


def test_the_version_is_printed() -> None:
    assert gaq("--version").output == f"{gaq_export.__version__}\n"


def test_without_a_command_the_help_lists_all_of_them() -> None:
    shown = gaq().output
    assert [name for name in COMMANDS if f" {name} " not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_each_of_its_options_say_what_they_are_for(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    visible = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    assert [p.name for p in visible if not str(p.help).endswith(".")] == []
    result = gaq(name, "--help")
    assert result.exit_code == 0


def numeric() -> list[tuple[str, str, TyperOption]]:
    """Return each option that takes a number, with its command and its longest name."""
    found = []
    for name, command in COMMANDS.items():
        hints = get_type_hints(command.callback)
        for option in command.params:
            kinds = get_args(hints.get(option.name, str)) or (hints.get(option.name, str),)
            if {int, float} & set(kinds):
                found.append((name, max(option.opts, key=len), option))
    return found


@pytest.mark.parametrize(("name", "option", "settings"), numeric(), ids=lambda value: str(value)[:20])
def test_a_number_out_of_range_is_one_line_for_every_option_that_takes_one(
    name: str, option: str, settings: TyperOption, tmp_path: Path
) -> None:
    assert settings.min is not None
    wrong = ["nan", "x", "", settings.min - 1, -(10**30)]
    if option != "--seed":  # of which the library knows the largest, since it depends on the number of images
        assert settings.max is not None
        wrong += [settings.max + 1, 10**30]
    for value in wrong:
        line = refused(tmp_path, name, f"{option}={value}")
        assert line.startswith(f"error: Invalid value for '{option}'")
        assert f"{name} --help`." in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--nosuch",), "error: No such option: --nosuch. See `root --help`."),
        (("smaple",), "error: No such command 'smaple'. Did you mean 'sample'? See `root --help`."),
        (("sample", "--numm", "3"), "error: No such option: --numm Did you mean --num? See `root sample --help`."),
        (("sample", "--num"), "error: Option '--num' requires an argument. See `root sample --help`."),
        (("triton",), "error: Missing argument 'run'. See `root triton --help`."),
        (("doctor", "twice"), "error: Got unexpected extra argument (twice). See `root doctor --help`."),
    ],
)
def test_words_that_no_command_knows_are_one_line(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    found = refused(tmp_path, *words)
    assert found.split()[:4] == line.split()[:4], found
