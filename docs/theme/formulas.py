"""Formulas in pages: a fence named `math`, in LaTeX as GitHub shows it, becomes MathML, which browsers draw."""

from typing import Any

from latex2mathml.converter import convert


def block(source: str, *_: Any, **__: Any) -> str:
    """Return a formula as a block of HTML; the further arguments are those of a custom fence of superfences."""
    return f'<div class="formula">{convert(source, display="block")}</div>'
