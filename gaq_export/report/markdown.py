"""Parts of a Markdown page of results: tables, and the machine's name."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    >>> markdown_table(["step", "dB"], [["0", "1.5"]])
    ['| step | dB |', '| --- | --- |', '| 0 | 1.5 |']
    """
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def machine() -> str:
    """Return the processor's name and number of cores."""
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"
