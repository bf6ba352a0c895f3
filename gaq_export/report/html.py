"""Parts of an HTML page that opens offline and never changes: styles inside, no script, all text escaped.

In: text, SVG and PNG. Out: HTML. Docstrings name the arguments that are HTML already; all others are escaped.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from gaq_export.errors import visible

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
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
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


def escape(text: str) -> str:
    """Return text as it may stand anywhere in a page, in attributes too; it is on one line and hides nothing."""
    # White space at the beginning stays, since it indents settings.
    indent = len(text) - len(text.lstrip(" "))
    return " " * indent + html.escape(visible(text[indent:]))


def document(title: str, header: str, sections: Iterable[str]) -> str:
    """Return a whole page; `header` and `sections` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{header}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, warning: str, *parts: str) -> str:
    """Make the head of a page; `parts` are HTML, all else is text."""
    return (
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n{note(warning)}'
        f"{''.join(parts)}</header>"
    )


def facts(facts: Mapping[str, str]) -> str:
    """Make a list of terms with their descriptions."""
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in facts.items())
    return f"<dl>\n{rows}</dl>\n"


def section(title: str, *parts: str) -> str:
    """Make a section of parts that are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def figure(svg: str, numbers: str) -> str:
    """Frame a figure; `numbers` is HTML."""
    return f'<figure>\n<div class="card">{svg}</div>\n<figcaption class="numbers">{numbers}</figcaption>\n</figure>\n'


def picture(png: bytes, words: str) -> str:
    """Make an image; `words` describe it for readers who cannot see it."""
    data = base64.b64encode(png).decode()  # inside the page, which may be sent by mail without any file beside it
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'


def pictures(pictures: Iterable[tuple[bytes, str]]) -> str:
    """Make a grid of PNGs, small ones enlarged without smoothing, each with its caption."""
    framed = (
        f'<figure>{picture(png, words)}<figcaption class="numbers">{escape(words)}</figcaption></figure>\n'
        for png, words in pictures
    )
    return f'<div class="pictures">\n{"".join(framed)}</div>\n'


def table(head: Iterable[str], rows: Iterable[Sequence[str]], marked: str = "") -> str:
    """Make a table; the row whose first cell is `marked` stands out."""
    lines = [_row("th", head, ' scope="col"')]  # the scope is how a screen reader finds a cell's heading
    for row in rows:
        lines.append(_row("td", row, "", ' class="chosen"' if row[0] == marked else ""))
    # In a box that scrolls, since a wide table would widen the whole page on a phone.
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
    """Make a paragraph that stands out, or "" if there is no text."""
    return f'<p class="note">{escape(text)}</p>\n' if text else ""  # so that callers need not ask


def code(text: str) -> str:
    """Mark as code."""
    return f"<code>{escape(text)}</code>"
