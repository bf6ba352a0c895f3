"""Comparing recipes from Python writes the same pages as the command, and measures nothing twice."""

from pathlib import Path

import pytest
import torch

from gaq_export.comparison.compare import compare
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import preset

TINY = {"preset": preset("tiny"), "images": 0}


def test_the_pages_have_every_recipe_and_the_same_call_measures_nothing_again(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    torch.set_num_threads(2)
    try:
        pages = compare(tiny_model, ("rtn",), folder=tmp_path, on_step=lambda *step: calls.append(step), **TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert calls == [(1, 1)]
    text = pages.markdown.read_text(encoding="utf-8")
    assert text.count("\n| `rtn` |") == 1
    assert "gaq_export.compare(model, ['rtn'])" in text
    assert pages.html.is_file()
    again = compare(tiny_model, ("rtn",), folder=tmp_path, on_step=lambda *step: calls.append(step), **TINY)
    assert (again, calls) == (pages, [(1, 1)])


def test_an_unknown_recipe_is_refused_before_anything_is_measured(tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="Unknown recipe 'rtm'"):
        compare(tiny_model, ("rtm",), folder=tmp_path / "new", **TINY)
    assert not (tmp_path / "new").exists()
