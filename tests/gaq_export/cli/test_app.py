"""The command line as a whole: its version, its help, and a help text for every option."""

import pytest
from typer.main import get_command

import gaq_export
from gaq_export.cli.app import app
from tests.gaq_export.commands import gaq

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
