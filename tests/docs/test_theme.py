"""What the site adds to the pages: links to sources that lead to a line, formulas as MathML, no need of a network."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="make docs installs it")
pytest.importorskip("latex2mathml", reason="make docs installs it")

from docs.theme import formulas, hooks

QUIET = {"NO_MKDOCS_2_WARNING": "1"}  # the theme's advertisement of its successor
FILE = "gaq_export/diffusion/samplers.py"


def _page(src_uri: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=src_uri))


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("architecture.md", f"[DDIM](../{FILE})", f"[DDIM](source/{FILE}.md)"),
        ("guide/build.md", f"[DDIM](../../{FILE})", f"[DDIM](../source/{FILE}.md)"),
        ("guide/build.md", "[backends](../../README.md#backends)", "[backends](../index.md#backends)"),
        ("guide/build.md", "[tables](../method.md#rounding)", "[tables](../method.md#rounding)"),
        ("index.md", "![picture](docs/ddpm-mnist-w4a8.png)", "![picture](ddpm-mnist-w4a8.png)"),
        ("index.md", "[rules](CONTRIBUTING.md)", "[rules](contributing.md)"),
        ("index.md", "[site](https://example.org/a.md)", "[site](https://example.org/a.md)"),
        ("index.md", "[below](#limits)", "[below](#limits)"),
    ],
)
def test_a_link_out_of_the_docs_leads_to_a_page_of_the_site(page: str, link: str, expected: str) -> None:
    assert hooks.on_page_markdown(link, _page(page)) == expected


def test_a_link_that_names_a_function_leads_to_its_line() -> None:
    html = f'<a href="source/{FILE}.html"><code>diffusion.samplers.ddim</code></a>'
    line = int(hooks.on_page_content(html).partition("#__codelineno-0-")[2].partition('"')[0])
    assert (hooks.ROOT / FILE).read_text(encoding="utf-8").splitlines()[line - 1].startswith("def ddim(")


def test_a_link_that_names_nothing_in_the_file_stays_as_it_is() -> None:
    html = f'<a href="source/{FILE}.html"><code>samplers</code></a>'
    assert hooks.on_page_content(html) == html


def test_a_formula_is_mathml() -> None:
    html = formulas.block(r"\frac{1}{2}")
    assert "<math" in html
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>" in html


@pytest.mark.slow
def test_the_site_loads_nothing_from_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=hooks.ROOT, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 50
    loaded = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?(?:https?:)?//')
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
