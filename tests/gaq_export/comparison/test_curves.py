"""The figure of a comparison: a curve for each row, the same bytes for the same numbers."""

from pathlib import Path

from gaq_export.comparison.curves import Curves, draw
from tests.gaq_export.comparison.test_tables import table


def test_every_row_has_a_curve_and_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    results = table(uniform=[20.0, 21.0], gac=[21.0, 21.5], rtn=[3.0, 2.0])
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, Curves(title="tiny W4A8", table=results, timesteps=(90, 10), omitted=("rtn",)))
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(row in text for row in results)
    assert "tiny W4A8, mean over seeds" in text
    assert "difference to uniform" in text
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_drawn_by_its_name(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", Curves(title="tiny W4A8", table=table(uniform=[20.0]), timesteps=(90, 10)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
