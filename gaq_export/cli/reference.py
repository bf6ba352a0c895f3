"""The reference of the command line as Markdown, written from the commands themselves.

`python -m gaq_export.cli.reference > docs/cli.md` writes it again; a test holds the file equal to it. The order is that
of the commands and of their options, and nothing in it depends on the machine or the terminal.
"""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.main import get_command

from gaq_export.cli.app import app

_HEAD = """# Command line

Written by `python -m gaq_export.cli.reference`: to change it, change the commands.

Every command takes `--help`. Long commands show their progress on stderr: a bar on a terminal, elsewhere a line every
30 seconds; `--quiet` silences both. An error that you can do something about is one line, and the exit code is then 2.
After Ctrl-C (exit code 130), the same command continues where it was.
"""


def reference() -> str:
    """Return the Markdown: a section for each command, a table for each group of its options."""
    group: Any = get_command(app)
    commands: dict[str, Any] = group.commands
    rows = [f"| [`{name}`](#{name}) | {_first_line(command.help)} |" for name, command in commands.items()]
    index = "\n".join(["| command | what it does |", "| --- | --- |", *rows])
    sections = [_section(name, command) for name, command in commands.items()]
    return "\n".join([_HEAD, index, "", *sections])


def _section(name: str, command: Any) -> str:
    """Return the heading, the help, the usage line and the tables of one command."""
    hints = get_type_hints(command.callback)
    kinds = {parameter: _kind(hint) for parameter, hint in hints.items() if parameter != "return"}
    shown = [p for p in command.params if p.name in kinds and not p.hidden]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    usage = ["gaq-export", name, "[OPTIONS]" if len(arguments) < len(shown) else ""]
    usage += [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    groups: dict[str, list[Any]] = {}
    for parameter in shown:
        title = "Arguments" if parameter in arguments else parameter.rich_help_panel or "Options"
        groups.setdefault(title, []).append(parameter)
    lines = [f"## {name}", "", " ".join(command.help.split()), "", "```text", " ".join(filter(None, usage)), "```", ""]
    for title, parameters in groups.items():
        lines += [f"| {title} | what it sets | default |", "| --- | --- | --- |"]
        lines += [f"| {_names(p, kinds[p.name])} | {_escaped(p.help)} | {_default(p)} |" for p in parameters] + [""]
    return "\n".join(lines)


def _kind(hint: Any) -> str:
    """Return the kind of value of a parameter with a type hint such as `list[str] | None`, empty for a switch."""
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    kind = (get_args(kinds[0]) or kinds)[0]  # list[str] -> str
    return {bool: "", str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}[kind]


def _names(parameter: Any, kind: str) -> str:
    """Return how an argument or option is written."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{f'{name} {kind}'.strip()}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    """Return a default; empty if there is none, if the help says it, and for a switch that is off."""
    if parameter.required or parameter.default in (None, "") or parameter.default is False:
        return ""
    value = parameter.opts[0] if parameter.default is True else parameter.default
    return f"`{value}`" + (f", or the variable `{parameter.envvar}`" if parameter.envvar else "")


def _first_line(text: str) -> str:
    return _escaped(text.partition("\n\n")[0])


def _escaped(text: str) -> str:
    """Return text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    typer.echo(reference(), nl=False)
