"""Parts of an HTML page that opens offline and stays as it is: styles inside, no script, all words escaped."""

from collections.abc import Iterable, Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --ink: #22262b; --soft: #5c636d; --line: #dfe2e6; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e6e9; --soft: #a0a7b1; --line: #363b42; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 600; margin: 4rem 0 .5rem; }
p { margin: 0 0 1rem; }
.kicker, .numbers { color: var(--soft); font-size: .875rem; }
.kicker { margin: 0 0 .25rem; }
.note { border-left: 3px solid var(--soft); padding-left: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0 0 1.25rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .75rem; overflow-x: auto; }
.card svg { display: block; width: 100%; min-width: 34rem; height: auto; }
.card img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .6rem; }
details { margin: .75rem 0; font-size: .9rem; }
summary { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .8125rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th:not(:first-child), td:not(:first-child) { text-align: right; }
th:last-child, td:last-child { padding-right: 0; }
.chosen td { font-weight: 600; }
code, pre, td:first-child { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: .9em; }
pre { overflow-x: auto; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def document(title: str, header: str, sections: Iterable[str]) -> str:
    """Return a whole page; `header` and `sections` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{header}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Make a section of parts that are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def figure(svg: str, numbers: str) -> str:
    """Frame a figure; `numbers` is HTML."""
    return f'<figure>\n<div class="card">{svg}</div>\n<figcaption class="numbers">{numbers}</figcaption>\n</figure>\n'


def table(head: Iterable[str], rows: Iterable[Sequence[str]], marked: str = "") -> str:
    """Make a table; the row whose first cell is `marked` stands out."""
    lines = [_row("th", head, ' scope="col"')]
    for row in rows:
        lines.append(_row("td", row, "", ' class="chosen"' if row[0] == marked else ""))
    return (
        f'<div class="scroll"><table>\n<thead>\n{lines[0]}</thead>\n'
        f"<tbody>\n{''.join(lines[1:])}</tbody>\n</table></div>\n"
    )


def _row(tag: str, cells: Iterable[str], cell: str = "", row: str = "") -> str:
    return f"<tr{row}>{''.join(f'<{tag}{cell}>{escape(text)}</{tag}>' for text in cells)}</tr>\n"


def text(text: str) -> str:
    """Make a paragraph."""
    return f"<p>{escape(text)}</p>\n"


def note(text: str) -> str:
    """Make a paragraph that stands out, nothing of no text."""
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def code(text: str) -> str:
    """Mark as code."""
    return f"<code>{escape(text)}</code>"
