"""Parts of a Markdown page of results: tables, texts from elsewhere, and the machine's name."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gaq_export.errors import visible


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    >>> markdown_table(["step", "dB"], [["0", "1.5"]])
    ['| step | dB |', '| --- | --- |', '| 0 | 1.5 |']
    """
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def plain(text: str) -> str:
    """Return a foreign text as Markdown that shows it as it is, on one line: no link, tag, heading, list or table."""
    line = visible(text).strip()
    line = re.sub(r"[\\`*\[\]<|&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)
    line = line.replace("://", "\\://").replace("www.", "www\\.")  # else they become links
    # What begins a list, a quotation, a heading or a rule where it stands first; a number begins a list too.
    return re.sub(r"^(\d*)([-+>#=.)])", r"\1\\\2", line)


def code(text: str) -> str:
    """Return a foreign text as code in a line of Markdown, or in a table's cell."""
    line = visible(text).replace("|", "\\|")
    # More ticks around it than it has in a row, apart from it by a space, which is not shown.
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    gap = " " if "`" in line else ""
    return f"{ticks}{gap}{line}{gap}{ticks}"


def machine() -> str:
    """Return the processor's name and number of cores."""
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"
