"""Names that break out of pages which do not escape them, and what holds of a page that does."""

import re
from collections.abc import Callable

from markdown_it import MarkdownIt

from gaq_export.errors import visible
from tests.gaq_export.outline import outline

HARMLESS = "a plain name"
TICKS = {"g", "path", "use", "text"}
NAMES = (
    "<img src=x onerror=alert(1)>",
    "</title></h1><script>alert(1)</script>",
    "\" onload=\"alert(1)' onload='alert(1)",
    "a\n# heading\n\n    code",
    "a\n---\nlicense: mit\n---\nb",
    "--- | a | b |\n| --- | --- |",
    "[x](javascript:y) ![z](//a.b) <http://a.b>",
    "`tick` ``two`` *bold* __bold__ ~~gone~~ \\",
    "- item",
    "> quoted",
    "12. item",
    "&lt;b&gt; &#60;",
    "back\\slash \\n \\\\",
    "{{ 7 * 7 }} {% x %} ${x} $x^2$ %s {0}",
    "$\\frac{",
    "a\"} } parameters { key: \"x\" value { string_value: \"y\" } }",
    "'''\nimport os\n\"\"\"",
    "\u202eevil\u2066 \u200f\ufeff",
    "\x1b[2J\x07\x08\x00\x7f\x9b",
    "half \udcff",
    "../../up",
)  # fmt: skip
_HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def check_html(make: Callable[[str], str], name: str) -> None:
    """Check that a page shows a name as it is, and has the same tags and attributes as with a harmless one."""
    made = make(name)
    page, plain = outline(made), outline(make(HARMLESS))
    # A name's height may move a chart's ticks.
    assert {tag: n for tag, n in page.seen.items() if tag not in TICKS} == {
        tag: n for tag, n in plain.seen.items() if tag not in TICKS
    }
    assert {key for key, _ in page.attributes} == {key for key, _ in plain.attributes}
    assert visible(name).strip() in page.text
    assert _HIDDEN.search(made) is None


def check_markdown(make: Callable[[str], str], name: str) -> None:
    """Check that a page shows a name as it is, and has the same parts as with a harmless one."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])

    def parts(text: str) -> tuple[list[str], str]:
        tokens = [inner for token in reader.parse(text) for inner in (token, *(token.children or ()))]
        kinds = [token.type for token in tokens if not token.type.startswith("text")]
        return kinds, "".join(
            token.content for token in tokens if token.type in ("text", "text_special", "code_inline")
        )

    made = make(name)
    (kinds, text), (plain, _) = parts(made), parts(make(HARMLESS))
    assert kinds == plain
    assert visible(name).strip() in text
    assert _HIDDEN.search(made) is None
