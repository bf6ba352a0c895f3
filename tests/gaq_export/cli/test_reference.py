"""`docs/cli.md` is what the commands say of themselves, and reads as Markdown."""

import re
from pathlib import Path

from typer.main import get_command

from gaq_export.cli.app import app
from gaq_export.cli.reference import reference

FILE = Path(__file__).resolve().parents[3] / "docs" / "cli.md"


def test_the_file_is_what_the_commands_say() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text == reference(), "run: python -m gaq_export.cli.reference > docs/cli.md"


def test_every_command_and_every_visible_option_is_there() -> None:
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", reference(), re.MULTILINE | re.DOTALL))
    commands = get_command(app).commands
    assert list(sections) == list(commands)
    for name, command in commands.items():
        options = {option for p in command.params if p.param_type_name == "option" for option in p.opts}
        missing = {option for option in options if f"`{option}" not in sections[name]}
        assert missing <= {"--help", "--job"}, name


def test_a_row_has_as_many_cells_as_its_table() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", reference(), re.MULTILINE)
    assert len(tables) > 15
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_defaults_are_shown_but_not_that_a_switch_is_off() -> None:
    lines = reference().splitlines()
    assert next(line for line in lines if line.startswith("| `--wbits N` |")).endswith("| `4` |")
    assert next(line for line in lines if line.startswith("| `--seed N` |")).endswith("| `0` |")
    assert next(line for line in lines if line.startswith("| `--compare` |")).endswith("|  |")
    assert "/home/" not in reference()
