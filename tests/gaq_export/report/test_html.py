"""Parts of a page: all text is escaped, images are inside, and a row can stand out."""

import base64

from gaq_export.report import html
from tests.gaq_export.outline import outline

NASTY = "<script>&\"'"


def test_all_text_is_escaped() -> None:
    page = html.document(
        NASTY,
        html.header(NASTY, NASTY, NASTY),
        [
            html.section(NASTY, html.text(NASTY), html.code(NASTY), html.facts({NASTY: NASTY})),
            html.table([NASTY], [[NASTY]]),
            html.pictures([(b"x", NASTY)]),
        ],
    )
    seen = outline(page)
    assert seen.seen["script"] == 0
    assert seen.text.count(NASTY) == 12


def test_a_picture_is_inside_the_page() -> None:
    png = b"\x89PNG of some kind"
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in html.picture(png, "words")


def test_the_marked_row_stands_out() -> None:
    table = html.table(["layer", "dB"], [["a", "1"], ["b", "2"]], marked="b")
    assert table.count('class="chosen"') == 1
    assert '<tr class="chosen"><td>b</td>' in table


def test_there_is_no_note_without_text() -> None:
    assert html.note("") == ""
    assert html.note("words") == '<p class="note">words</p>\n'
